"""The package that prepare.py, train.py and sample.py share."""
