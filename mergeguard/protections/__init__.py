"""Protections: schemes that put evidence of ownership into a model, or read it off.

A scheme is one class (`Protection`, or `TextProtection` where text is all that a verifier needs) with four parts:

`embed`
    Draws secret keys from the random source that it is given, changes the model, and returns both.
`decoys`
    Fresh keys of the same form that were never embedded. They show what a suspect answers to keys that it cannot know.
`probes` and `judge`, or `read`
    What to ask of a suspect and what counts as a hit; or, with deeper access, a reading of its weights.
`defaults`
    The parameters. A variant is written with those that differ: ``instructional_fingerprint(variant=dialogue)``.

What a scheme reports is a `Reading`, hits of trials or a score, and never a verdict: whether a model is its owner's is
decided outside, by comparison (see `mergeguard.matrix`). A scheme cannot choose its threshold.

Evidence
--------

`Evidence` is what the owner keeps: plain JSON data, and for some schemes a few private tensors. Its keys are secret.
They are drawn from the random source alone, so that the same seed gives the same keys, and they appear in no report, no
log and no `repr`. The suite draws them from public seeds; `mergeguard embed`, from the operating system.

Planted mistakes
----------------

Every run also runs schemes that are wrong on purpose (`mergeguard.protections.planted`): one that always verifies, one
that never does, one with evidence at random, one that crashes and one that embeds nothing. Each must be caught, and the
report says by what.

A third party registers a class in the entry-point group ``mergeguard.protections``; `mergeguard.testing` is the kit
that gates it.
"""
