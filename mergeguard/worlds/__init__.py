"""Worlds: the models that a protection is measured on, all of one ancestry.

A world (`World`) holds

- a *base* model,
- the owner's clean *upstream*, fine-tuned from the base before any evidence is embedded,
- one or more *donors*, fine-tuned from the same base by somebody else,
- a tokenizer, texts to train and verify with, and a budget for each scheme,
- a *skill* for each upstream: questions that it answers and the base does not.

Skills decide what a *theft* is. A merge that keeps less than half of a parent's skill is one that nobody would make,
and losing evidence in it is no loss. The skills are measured on the matched control, which does not know the
protection, so that no scheme can argue a theft away.

Three kinds of worlds
---------------------

``tiny``
    Shipped with the package: models of 1.7 million parameters, trained from scratch, with the skills
    `refusal` and `arithmetic`. It runs on a laptop, and stands in for real models as far as `mergeguard compare
    --worlds` has measured.
``smollm2``
    Real: SmolLM2-135M-Instruct and two upstreams that ship as adapters. Its base is fetched once, from PyPI.
a file
    ``--world my-trio.toml`` names any base, upstream and donors by folder or hub id, and their skills. Models of
    another architecture, vocabulary or ancestor are refused before anything is measured.

.. code-block:: bash

    mergeguard list worlds
    mergeguard world check tiny

`check` prints each requirement of a world with its measured value. Weights are read tensor by tensor, and a world is
never changed: what a scheme trains is a copy. A third party registers a function that returns a `World` in the
entry-point group ``mergeguard.worlds``, and a skill in ``mergeguard.skills``.
"""
