"""A federation over a network: the same hooks, the same numbers; Flower (extra ``fedlscl[flower]``) carries it."""
