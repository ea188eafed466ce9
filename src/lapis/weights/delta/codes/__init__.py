"""A tensor of float32 differences in, the parts that are stored out, and back: one file for each way of storing."""
