"""Stands in for the Intel Gaudi plugin of torch: the part of its public interface that a trainer meets."""
