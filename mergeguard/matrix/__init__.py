"""The matrix: every protection, merged by every method at every coefficient, and a verdict for each cell.

A *cell*, or case, is a protection, a merger, a coefficient, a world and a seed. For each, the protected upstream is
merged with the donor, and the evidence is read on the merged model and on the *controls*, which do not hold it: the
base, the clean upstream, each donor, and the *matched control*, the same merge with the clean upstream in the protected
model's place. On each, decoys are read as well.

The verdict
-----------

`mergeguard.matrix.verdict` decides from these readings alone, without a model in sight.

``survived``
    The keys beat every control, the worst one included, at level 2e-5: that is 1e-3 shared by the 45 cells of a
    protection's default matrix. And on the merged model itself they beat the decoys at level 1e-3.
``overclaims``
    The keys beat every control, but on the merged model unseen keys answer too. Anyone could make such a key.
``lost``
    The keys do not beat the worst control.
``undecidable``
    There are too few trials to reach the level, whatever they show. The error says how many would do.

Counts are compared by a one-sided Fisher exact test. Trials that share a trigger are independent only given it: the
p-value is then conditional on that trigger, and the outcome says so.

The gate
--------

Only thefts count: merges whose matched control keeps at least half of each parent's skill. A theft whose verdict is not
``survived`` is red, unless it is recorded as a known loss, with the range of its VSR and the reason
(`mergeguard.matrix.recorded`). Records are strict: a recorded cell that survives, leaves its range, crashes or no
longer exists is red as well. Before anything is merged a scheme has to pass gates of its own
(`mergeguard.matrix.gates`): effective, harmless, specific, and persistent through files.

Reading a row
-------------

The *critical coefficient* is the smallest theft from which every larger one survives. It is found by looking at every
theft: survival need not rise with the coefficient. The *area* is that under VSR over the coefficient, a mean VSR.

How it runs
-----------

`expand` lists the cases, and `run` measures them on worker processes, GPUs or a Ray cluster. Neither the executor nor
the number of workers changes a result: all randomness comes from `derive_seed` on what is measured. What is expensive
is cached by content, code included, so that a run that was killed goes on where it was.

.. code-block:: python

    import mergeguard
    from mergeguard.matrix.cases import expand

    results = mergeguard.run(expand(["gaussian_probe"], ["linear"], [0.5]), workers=1)
    print(results.outcomes[0].verdict, results.holds)
"""
