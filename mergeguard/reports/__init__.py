"""Reports: outcomes as JSON, in the terminal, as Markdown, HTML and JUnit XML. Pure functions of results; no torch.

This is also the way for who compares protections: the same models, the same merges, the same controls for every scheme,
and files that can be checked without running anything again. The example takes two variants of `gaussian_probe`, the
quickest scheme; write others in their place.

1. Run both
-----------

.. code-block:: bash

    mergeguard run --protection gaussian_probe --merger linear --merger ties --coefficients 0.3,0.5 --output strong
    mergeguard run --protection "gaussian_probe(strength=0.005)" --merger linear --merger ties \
      --coefficients 0.3,0.5 --output weak

Each folder now holds

``results.json``
    Everything that was measured, with the world's digests and the environment, in a published JSON Schema. The other
    reports are made from it alone.
``report.html``
    One file for a browser: the matrix, the curve of VSR over the coefficient with its intervals and the
    skills under it, gates, controls, and for each cell its numbers and the command that runs it again.
``report.md``
    The same for a comment on a pull request.
``junit.xml``
    The same for continuous integration.

2. Read one
-----------

Look at a cell in this order. Is it a theft? Else nobody would make that merge, and its VSR says nothing. What is the
verdict? A high VSR with ``overclaims`` proves nothing, because keys that were never embedded answer too. What is the
interval? With 8 keys, 6 hits are anything from .35 to .97. Then, for the row, the critical coefficient and the area.

The gates before merging and the planted mistakes say whether the run itself can be believed: a run in which a planted
mistake was not caught has shown nothing.

3. Put schemes side by side
---------------------------

.. code-block:: bash

    cp strong/results.json strong.json
    cp weak/results.json weak.json
    mergeguard report strong.json weak.json --output schemes.md
    mergeguard report strong.json --html strong.html

The page opens with a leaderboard: worst case, mean area, critical coefficients, harmlessness and specificity. Schemes
share a table only if they were measured on the same models, with the same seeds, in the same cells, and claim the same;
others get a table of their own.

4. Compare two runs
-------------------

After a change of a scheme, run it again and ask which cells changed, and whether more than chance explains it:

.. code-block:: bash

    mergeguard run --protection gaussian_probe --merger linear --merger ties --coefficients 0.3,0.5 --output again
    mergeguard compare strong/results.json again/results.json --markdown changes.md

Counts are compared by Fisher's exact test, corrected for the number of cells. The exit code is 1 if a survivor was
lost. How well one world predicts another is a question of its own, `mergeguard compare --worlds`.

From Python:

.. code-block:: python

    from mergeguard.reports.results_json import read_results
    from mergeguard.reports.summary import summary_of

    for row in summary_of(read_results("strong.json")):
        print(row.protection, row.merger_spec, row.critical_coefficient, row.area)
"""
