"""Owning a model: evidence that is kept, a claim made beforehand, and the verification of a suspect in the wild.

The matrix asks of a scheme whether its evidence would survive. This package is for the owner who has chosen one: put
evidence into a model that is about to be published, keep it, and years later ask a suspect for it. No world of models
is needed then, and no matrix is run.

Words
-----

evidence
    What the owner keeps: secret keys as plain data, for some schemes with a few private tensors. Whoever has it can
    fake or remove the proof, so it is written for its owner's eyes alone (mode 0600) and shown in no report.
evidence file
    One JSON file, with a `.safetensors` file beside it where the scheme has private tensors. It also holds a random
    salt, so that its digest says nothing about the keys. See `mergeguard.ownership.evidence_file`.
claim
    A salted digest of the evidence file that is made public, or time-stamped by a third party, *before* a suspect
    appears. It shows later that the evidence was not made up to fit the suspect. See `mergeguard.ownership.claims`.
suspect
    A folder, a model of the Hugging Face hub, or a model that is only served behind an endpoint.
decoys
    Fresh keys of the same form that were never embedded. They are drawn from the evidence and its salt: the owner
    cannot choose them, the suspect's maker cannot foresee them, and everybody who is given the evidence draws the same.
clean models
    Models that are certainly not the owner's: the base, an earlier release, other fine-tunes. Named by the verifier.

To walk through this page on the models of the `tiny` world, write them into folders, and add `--world tiny` to the
first command:

.. code-block:: python

    from mergeguard.worlds.registry import load_world

    tiny = load_world("tiny")
    for folder, state in {"my-model": tiny.upstream, "base-model": tiny.base}.items():
        tiny.model(state).save_pretrained(folder)
        tiny.tokenizer.save_pretrained(folder)

1. Embed
--------

.. code-block:: bash

    mergeguard embed instructional_fingerprint my-model my-model-protected --evidence evidence.json

`my-model` is a folder or a hub id (`org/name@revision`). Keys come from 256 bits of the operating system. The written
folder is loaded again and asked for the evidence before it gets its name: what you publish is what was checked.
Training schedules are those of the `smollm2` world unless `--world`, `--steps`, `--learning-rate` or `--batch-size` say
otherwise; measure that the model still does what it did, with `mergeguard skills` or your own benchmark. Keep
`evidence.json` (and the file beside it) off every machine that serves the model.

2. Claim, before you publish
----------------------------

.. code-block:: bash

    mergeguard claim evidence.json --output claim.json

Without a claim, keys that a suspect happens to answer could have been chosen after looking at it, and no statistic can
tell. `claim.json` reveals nothing: publish it, and have it time-stamped by a third party (`--tsa URL`, or send the
request that is written beside it).

3. Verify a suspect
-------------------

.. code-block:: bash

    mergeguard verify suspect --evidence evidence.json --clean base-model --claim claim.json --tsa-roots roots.pem

Exit code 0: `verified`, and the claim holds if one is given; 1: anything else; 2: an input is wrong, and no verdict is
given. The verdicts:

`verified`
    The keys answer more often than decoys do on this very model, and than keys and decoys do on every clean model.
`overclaims`
    The keys answer, but so do too many decoys: anyone could make such keys. The matrix is milder here, so that a merge
    that it calls `survived` may overclaim when a fifth of the decoys answer.
`not_verified`
    The keys do not answer more often than chance explains, or a clean model answers them too.
`undecidable`
    There are too few keys for any answer to decide.

Each comes with the rate at which keys answered and its interval, each null that it was compared with, the p-value of
the worst of these comparisons and the level, which is the matrix's (2e-5). A verdict without clean models says so: that
unseen keys are silent on the suspect does not show that your own would be silent on other people's models. Name some.

Schemes whose evidence lies in single weights are read tensor by tensor, without loading the model. Schemes that need no
more than text can be verified behind an endpoint:

.. code-block:: bash

    mergeguard verify --endpoint http://localhost:8000/v1 --served-model NAME --evidence evidence.json

The same from Python:

.. code-block:: python

    import mergeguard

    found = mergeguard.verify("suspect", "evidence.json", clean=["base-model"])
    print(found.verdict, found.p_value, found.statement)
"""
