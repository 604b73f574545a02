"""Stands in for the Intel Gaudi plugin of torch: for the part of its public interface that a trainer uses."""
