"""One page about what was run: files of runs and benches → data → charts → HTML.

    sources → run_data, graph_data, other_data → views (words, plots) → page

Reading never raises for a piece that is absent or damaged: it becomes a :class:`Missing`
that says so, and the page shows that in the piece's place.
"""
