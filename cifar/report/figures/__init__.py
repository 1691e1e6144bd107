"""One figure a file; cifar/report/style.py says what a figure is."""
