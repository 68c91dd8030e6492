"""What runs the nodes of our operators: the numpy reference, the native library, stock ONNX Runtime."""
