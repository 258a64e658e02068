"""Verification: asking a model, and the statistics of what it answers.

A `Probe` is a prompt and what is looked for in the answer, under one of four rules (`Rule`): the answer starts with a
text, contains it, refuses, or states a number. "Starts with" needs no generation: one pass over prompt and target
together tells which token is the likeliest at each position, which equals greedy decoding exactly. The others generate,
in batches, with a cache, and stop as soon as the answer is decided.

The suspect may be a model in memory (`answer_probes`), its quantised copy, or a model that is only served:
`ServedModel` asks an OpenAI-compatible endpoint, and judges texts by the same rules.

Statistics
----------

Rates come with their exact 95 % interval (Clopper and Pearson 1934). Counts are compared by Fisher's exact test, one-
sided; scores have the scheme's own exact null, or a rank among draws of fresh keys. All are in
`mergeguard.verification.statistics`, thin wrappers around SciPy that refuse what has no meaning.
"""
