"""The data that ships with the package (see NOTICE) and the reading of full MNIST."""
