"""Which training images can come out again? What an audit makes of the images that a model was trained on.

Beside each generation the nearest training image (`nearest`); spectra at the noised images themselves, with their
captions and without (`look`); of each image a verdict by written rules (`verdict`).
"""
