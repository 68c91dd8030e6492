"""What runs a siman.BinaryConv2d node: the numpy reference, the native library, stock ONNX Runtime."""
