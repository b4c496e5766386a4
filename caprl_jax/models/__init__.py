"""Qwen policies and judges as pure functions: vlm.py joins decoder.py and vision.py.

families/ has one file for each model family; hf/ reads and writes Hugging Face directories; flash/
has attention's kernels for GPUs and TPUs.
"""
