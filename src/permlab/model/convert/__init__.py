"""Formats that published weights come in, a file each, named as the files end.

A file has `convert(path, folder)`: what is in a published file, written as a checkpoint that transformers or timm
opens. The file is read as data, and refused with a `ValueError` where it holds another model than is expected.
"""
