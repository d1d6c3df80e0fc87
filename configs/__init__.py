"""Shipped data, installed as ``fastdiffclip.configs``: recipes, prompt sets and the tokenizer's vocabulary.

Read through ``importlib.resources.files("fastdiffclip.configs")``; there is no code to import here.
``make_tokenizer.py`` is run by hand and wrote ``tokenizer.json``.
"""
