"""A stock Flower app: strategy, messages and loop are Flower's; the net and the data are those of fedlscl."""
