"""The figures of a report. cifar/report/style.py describes what a figure consists of."""
