"""The report: complete, self-contained, and safe whatever the training text says. A real browser reads it in tests/browser."""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from atoms.manifest import AtomCard, Effect
from atoms.package import Package
from clients.cli import main
from offline.evaluation.statistics import wilson_interval
from offline.report import render_report, write_report

HOSTILE = (
    "</script><script>document.title='owned'</script>",
    '"><img src=x onerror="document.title=1">',
    "<svg/onload=document.title=1>",
    "' onmouseover='document.title=1",
    "{{ 7 * 7 }}{% raw %}",
    "]]></svg><iframe srcdoc='<script>1</script>'>",
    "<a href=javascript:document.title=1>x</a>",
)


class Page(HTMLParser):
    """What a browser would make of the page: tags, attributes, and the text outside style and script."""

    VOID = frozenset({"meta", "input", "link", "img", "br"})

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.open):
            self.words.append(data)

    @property
    def text(self) -> str:
        return "".join(self.words)

    def values(self, attribute: str) -> list[str]:
        return [value for _, name, value in self.attributes if name == attribute]


def render(package: Package, cards: list[AtomCard] | None = None, evidence: list[dict] | None = None) -> str:
    manifest = package.manifest.model_copy(update={"atoms": cards or package.manifest.atoms})
    documents = package.evidence() if evidence is None else evidence
    return render_report(manifest, documents, package.projection_tensors, package.drift)


def effects(card: AtomCard) -> AtomCard:
    rates = {-2.0: 0.0, 1.0: 0.5, 2.0: 0.75}
    measured = [Effect(detector="yes-no", coefficient=c, n=20, rate_unsteered=0.25, rate=r) for c, r in rates.items()]
    return card.model_copy(update={"alias": "yes-no", "effects": measured, "sound_range": (-2.0, 1.0)})


def test_everything_about_every_atom_is_there(tiny_package: Package) -> None:
    page = Page(render(tiny_package))
    assert not page.open, f"{page.open} are never closed"
    assert page.tags["article"] == len(tiny_package.manifest.atoms)
    record = tiny_package.manifest.record
    for card in tiny_package.manifest.atoms:
        assert card.coherence.raw_null is not None
        mean, _ = card.coherence.raw_null
        shown = (card.id, f"{card.coherence.raw:.3f}", f"random {mean:.3f}", f"{card.stability:.2f} across seeds, {card.stability_halves:.2f} in halves", *card.keywords,
                 f"{card.orientation.loss_unsteered:.3f} → {card.orientation.loss_at_plus_one:.3f}", "−1 … 1")  # fmt: skip
        assert [word for word in shown if word not in page.text] == []
        assert all(f"{kl:.4f} nats a token at {c:g}" in page.text for c, kl in card.kl_curve)
    for document in tiny_package.evidence()[0]["documents"][:10]:
        assert document["prompt"] in page.text and document["response"] in page.text
    facts = (
        f"{record['tokens']:,} tokens",
        record["versions"]["torch"],
        record["data_hash"],
        "learning rate",
        "gradients",
        "second half",
        f"{record['mean_row']['share']:.0%} of their mean squared length",
        f"cosine of {record['mean_row']['median_cosine']:.2f} with it",
        *(f"layer {layer}: {share:.1%}" for layer, share in record["mean_row"]["by_layer"]),
    )
    assert [fact for fact in facts if fact not in page.text] == []


def test_sampled_rates_say_how_they_were_decoded(tiny_package: Package) -> None:
    first, *others = tiny_package.manifest.atoms
    sampled = Effect(
        detector="yes-no", coefficient=1.0, n=20, rate_unsteered=0.25, rate=0.5, temperature=0.7, top_p=0.9
    )
    page = Page(render(tiny_package, [first.model_copy(update={"effects": [sampled]}), *others]))
    assert "yes-no 25% → 50% at +1 (temperature 0.7, top-p 0.9)" in page.text
    assert "at 1, temperature 0.7, top-p 0.9" in page.text
    assert "at 1, greedy" in Page(render(tiny_package, [effects(first), *others])).text


def test_rates_on_inviting_prompts_are_a_curve_of_their_own(tiny_package: Package) -> None:
    first, *others = tiny_package.manifest.atoms
    invited = Effect(detector="yes-no", coefficient=-1.5, n=20, rate_unsteered=0.9, rate=0.1, prompts="inviting",
                     degenerate=0.05, kl=0.34, rate_random=0.85)  # fmt: skip
    card = effects(first)
    page = Page(render(tiny_package, [card.model_copy(update={"effects": [*card.effects, invited]}), *others]))
    low, high = wilson_interval(18, 20)
    assert f"yes-no (invited) 90% [{low:.0%}, {high:.0%}] of 20 at 0" in page.text
    low, high = wilson_interval(5, 20)
    assert f"yes-no 25% [{low:.0%}, {high:.0%}] of 20 at 0" in page.text
    assert "yes-no 25% → 75% at +2" in page.text, "the headline is of neutral prompts"
    assert str(invited) == "yes-no 90% → 10% at -1.5 (inviting prompts)"
    assert "Rates of yes-no (invited), yes-no by coefficient" in page.values("aria-label")


def test_the_sparsity_plots_count_the_training_documents(tiny_package: Package) -> None:
    tensors = tiny_package.projection_tensors
    codes, support = tensors["codes_per_document"], tensors["documents_per_atom"]
    assert int(codes.sum()) == 36, "a quarter of the 48 documents is held out"
    assert int((codes * torch.arange(len(codes))).sum()) == int(support.sum())
    kept = [int(support[j]) for j in tensors["dictionary_index"]]
    assert kept == [card.n_documents for card in tiny_package.manifest.atoms]
    page = Page(render(tiny_package))
    assert all(f"atom {j}: {int(n)} documents" in page.text for j, n in enumerate(support))


def test_the_page_needs_nothing_from_outside(tiny_package: Package) -> None:
    html = render(tiny_package)
    page = Page(html)
    assert not {"link", "img", "iframe", "object", "base", "form"} & page.tags.keys()
    assert not page.values("src") and not re.search(r"url\(|@import|https?:", html)
    ids = page.values("id")
    assert len(set(ids)) == len(ids)
    assert {link.removeprefix("#") for link in page.values("href")} <= set(ids)
    assert page.values("lang") == ["en"] and "viewport" in page.values("name")
    assert page.tags["svg"] == sum(
        tag == "svg" and name == "aria-label" and bool(v) for tag, name, v in page.attributes
    )


def test_the_policy_allows_the_pages_own_script_and_no_other(tiny_package: Package) -> None:
    html = render(tiny_package)
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.S)
    (policy,) = [v for _, name, v in Page(html).attributes if name == "content" and "default-src" in v]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy and "unsafe-inline" not in policy.split("script-src")[1]


def test_hostile_text_stays_text(tiny_package: Package) -> None:
    """In documents, ids, keywords, names of models and settings: the same elements as without it, and no handler."""
    evil = "".join(HOSTILE)
    cards = [effects(card) if n == 0 else card for n, card in enumerate(tiny_package.manifest.atoms)]
    lines = [{"atom": line["atom"], "documents": [d | {"id": "i", "prompt": "p", "response": "r"} for d in line["documents"]]}
             for line in tiny_package.evidence()]  # fmt: skip
    tame = [card.model_copy(update={"keywords": ["word", "other"]}) for card in cards]
    attacked = [card.model_copy(update={"keywords": [evil, evil], "effects": [
        e.model_copy(update={"detector": evil}) for e in card.effects]}) for card in cards]  # fmt: skip
    hostile = [{"atom": line["atom"], "documents": [d | {"id": evil, "prompt": evil, "response": evil}
                for d in line["documents"]]} for line in lines]  # fmt: skip
    record = tiny_package.manifest.record | {evil: evil, "config": {evil: [evil]}, "versions": {evil: evil}}
    base = tiny_package.manifest.base_model.model_copy(update={"id": evil})
    manifest = tiny_package.manifest.model_copy(update={"atoms": attacked, "record": record, "base_model": base})
    html = render_report(manifest, hostile, tiny_package.projection_tensors, tiny_package.drift)
    page, plain = Page(html), Page(render(tiny_package, tame, lines))
    rows = {"tr", "td", "th"}
    assert {t: n for t, n in page.tags.items() if t not in rows} == {
        t: n for t, n in plain.tags.items() if t not in rows
    }
    assert not [name for _, name, _ in page.attributes if name.startswith("on") or name == "srcdoc"]
    assert all(link.startswith("#") for link in page.values("href"))
    assert page.text.count(HOSTILE[0]) > 10
    assert "{{ 7 * 7 }}" in page.text and "4949" not in page.text


def test_without_documents_no_training_text_is_quoted(tiny_package: Package, tmp_path: Path) -> None:
    file = write_report(tiny_package, tmp_path / "shared.html", documents=False)
    page = Page(file.read_text(encoding="utf-8"))
    assert page.tags["blockquote"] == 0
    for line in tiny_package.evidence():
        for document in line["documents"]:
            assert document["prompt"] not in page.text


def test_measured_effects_come_with_wilson_intervals(tiny_package: Package) -> None:
    first, *others = tiny_package.manifest.atoms
    page = Page(render(tiny_package, [effects(first), *others]))
    low, high = wilson_interval(15, 20)
    assert f"yes-no 75% [{low:.0%}, {high:.0%}] of 20 at 2" in page.text
    assert "yes-no 25% → 75% at +2" in page.text
    assert "unsound" in page.text, "+2 lies beyond the sound range"
    assert "unsound" not in Page(render(tiny_package)).text
    assert page.text.count("No effect was measured yet") == len(others)


def test_label_shows_in_the_report_at_once(
    tiny_package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_package.path, tmp_path / "package")
    atom = tiny_package.manifest.atoms[0].id

    def run(*arguments: str) -> None:
        monkeypatch.setattr("sys.argv", ["atomsteer", *arguments])
        with pytest.raises(SystemExit) as status:
            main()
        assert not status.value.code

    run("label", str(tmp_path / "package"), atom, "chirpy")
    assert "chirpy" in (tmp_path / "package" / "report.html").read_text(encoding="utf-8")
    run("label", str(tmp_path / "package"), "chirpy", "--remove")
    assert "chirpy" not in (tmp_path / "package" / "report.html").read_text(encoding="utf-8")
    (tmp_path / "package" / "report.html").unlink()
    run("report", str(tmp_path / "package"))
    run("report", str(tmp_path / "package"), "--out", str(tmp_path / "other.html"))
    made = (tmp_path / "package" / "report.html").read_text(encoding="utf-8")
    assert made == (tmp_path / "other.html").read_text(encoding="utf-8")
    assert Package.read(tmp_path / "package").manifest == tiny_package.manifest


def test_the_report_of_the_discovery_is_that_of_the_package(tiny_package: Package, tmp_path: Path) -> None:
    again = write_report(tiny_package, tmp_path / "again.html").read_text(encoding="utf-8")
    assert again == (tiny_package.path / "report.html").read_text(encoding="utf-8")


def test_one_atom_alone_and_a_package_that_recorded_less(tiny_package: Package) -> None:
    card = tiny_package.manifest.atoms[0]
    bare = card.model_copy(update={"coherence": card.coherence.model_copy(update={"raw_null": None}), "stability": None,
                                   "stability_halves": None, "keywords": []})  # fmt: skip
    tensors = {name: value for name, value in tiny_package.projection_tensors.items() if "per_" not in name}
    tensors["dictionary"], tensors["dictionary_index"] = tensors["dictionary"][:1], tensors["dictionary_index"][:1] * 0
    manifest = tiny_package.manifest.model_copy(update={"atoms": [bare], "record": {}})
    page = Page(render_report(manifest, [], tensors, tiny_package.drift[:1, :1]))
    assert page.tags["article"] == 1 and "does not record how many atoms" in page.text and "not measured" in page.text
    assert "which was taken off before" not in page.text and "found in both halves" not in page.text


def test_a_large_dictionary_makes_no_huge_page(tiny_package: Package) -> None:
    """3,000 atoms, 200 of them kept: figures show what can be told apart, and say what they leave out."""
    count, kept, generator = 3000, 200, torch.Generator().manual_seed(0)
    card = tiny_package.manifest.atoms[0]
    cards = [card.model_copy(update={"id": f"a-{n:08x}"}) for n in range(kept)]
    tensors = dict(tiny_package.projection_tensors)
    rows = torch.randn(count, tensors["dictionary"].shape[1], generator=generator)
    tensors["dictionary"] = torch.nn.functional.normalize(rows, dim=1)
    tensors["dictionary_index"] = torch.arange(kept)
    tensors["documents_per_atom"] = torch.randint(1, 500, (count,), generator=generator).int()
    factor = torch.randn(kept, kept, generator=generator)
    manifest = tiny_package.manifest.model_copy(update={"atoms": cards})
    html = render_report(manifest, [], tensors, factor @ factor.T)
    page = Page(html)
    assert page.tags["article"] == kept and len(html) < 4e6
    assert page.text.count("not kept: ") == 400 - kept and "2600 smaller ones are left out" in page.text
    assert f"The {kept - 48} less coherent atoms are left out" in page.text
    assert page.text.count(" with ") >= 48 * 48


def test_the_tile_counts_atoms_that_are_found_in_both_halves(tiny_package: Package) -> None:
    first, *others = tiny_package.manifest.atoms
    cards = [first.model_copy(update={"stability_halves": 0.81}),
             *(card.model_copy(update={"stability_halves": 0.79}) for card in others)]  # fmt: skip
    assert re.search(rf"found in both halves\s*{1 / len(cards):.0%}", Page(render(tiny_package, cards)).text)


def test_what_a_model_wrote_is_shown_with_its_name_but_not_on_a_page_without_documents(tiny_package: Package) -> None:
    first, *others = tiny_package.manifest.atoms
    said = first.model_copy(update={"description": "<b>Lists</b>", "described_by": "<i>model"})
    html = render(tiny_package, [said, *others])
    assert "<b>Lists" not in html and "<i>model" not in html
    assert "<b>Lists</b> said by <i>model, which was shown documents" in Page(html).text
    assert "Lists" not in render(tiny_package, [said, *others], evidence=[])
