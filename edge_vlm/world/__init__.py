"""The rendered world of the demo model: scenes, their questions and pictures, in NumPy alone."""
