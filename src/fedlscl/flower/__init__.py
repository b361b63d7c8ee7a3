"""Federations over a network with Flower (extra ``fedlscl[flower]``); results equal those of a simulation."""
