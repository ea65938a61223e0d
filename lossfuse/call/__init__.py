"""The meaning of a call, before any number: the implementation, the reduction, DTensors."""
