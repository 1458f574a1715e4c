"""Published results hold what the documents say of them."""

from __future__ import annotations

import json
import math
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent


def test_the_readme_shows_the_published_figures() -> None:
    path = REPOSITORY / "docs" / "results" / "federation.json"
    report = json.loads(path.read_text(encoding="utf-8"))
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    methods = {entry["method"]: entry for entry in report["methods"]}
    assert {"fedit", "samv2"} <= methods.keys()
    for entry in methods.values():
        domains = entry["domains"]
        mean = math.exp(sum(map(math.log, domains.values())) / len(domains))
        assert math.isclose(mean, entry["perplexity"], rel_tol=1e-9)
        for value in (mean, *domains.values()):
            assert f"{value:.2f}" in readme
        assert f"{entry['bytes_up_per_client_round'] / 1000:,.1f} kB" in readme
        assert entry["seconds"] > 0 and "settings" in entry
