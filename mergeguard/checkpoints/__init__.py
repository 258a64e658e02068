"""Checkpoints: files of models, read and written without holding a whole model in memory.

Reading trusts nothing. A safetensors header is checked before a tensor is (`mergeguard.checkpoints.header`), an index
must agree with its shards, and every refusal is one line that names file and tensor. Pickle files, which run code when
they are loaded, are refused unless asked for; where they are read, only tensors are.

A `Source` gives tensors by name, one at a time and from any thread: a folder as transformers saves it, one
``.safetensors`` file, a hub id, or one of these with a LoRA adapter on top.

Writing is whole or not at all. A folder is made under a hidden name and renamed when it is complete; a file is replaced
in one step. A merge also leaves a manifest with the SHA-256 of every file that was read and written, which
`mergeguard merge --check` compares.
"""
