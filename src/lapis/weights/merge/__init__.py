"""A recipe or a formula in, the tensors of the output out, each with its kernel; methods/ has the arithmetic."""
