"""The panel's modules over a stand-in for the viewer: label maps of two series, one of them on screen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from app.test_panel import PANEL, node, run_node

__all__ = ["node"]  # a fixture

STUB = Path(__file__).parent / "viewer_stub.mjs"
_BEGIN = f"""
    import {{ image, making, maps }} from "{STUB.as_uri()}";
    import * as labelmap from "{(PANEL / "labelmap.js").as_uri()}";
    const [one, two] = [image("1.1"), image("1.2")];
    const mask = (text) => Uint8Array.from(text, Number);
    const names = (image) => labelmap.structures(image).map(({{ name }}) => name).join();
    const refused = (act) => Promise.resolve().then(act).then(() => "done", (error) => error.message);
    await labelmap.ensure(two, ["liver", "spleen"]);
    await labelmap.ensure(one, ["liver", "spleen"]);
"""


def _told(node: str, script: str) -> Any:
    return json.loads(run_node(node, _BEGIN + script))


def test_words_add_no_name_before_their_question_is_answered(node: str) -> None:
    script = f"""
        import {{ Words }} from "{(PANEL / "words.js").as_uri()}";
        labelmap.paste(one, mask("1000"), {{ 1: "spleen" }});
        const asked = [];
        const answers = [null, new Map()]; // Cancel, Keep them
        const automatic = {{
            byHand: () => new Map([["spleen", "as it is"]]),
            mayReplace: async (byHand) => (asked.push(...byHand.keys()), answers.shift()),
        }};
        const words = new Words({{ panel: {{ shows: () => true }}, automatic }}, "segment");
        const say = () => words.keeps(one, mask("1200"), {{ 1: "duct", 2: "vein" }});
        const states = [await say(), names(one)];
        const kept = await say();
        states.push(kept, names(one));
        labelmap.paste(one, mask("1200"), {{ 1: "duct", 2: "vein" }}, kept);
        console.log(JSON.stringify([...states, names(one), Array.from(labelmap.voxels(one)), asked]));
    """
    before = "liver,spleen"
    assert _told(node, script) == [
        None, before, ["spleen"], before, f"{before},duct,vein", [2, 4, 0, 0], ["spleen", "spleen"],
    ]  # fmt: skip


def test_words_that_find_no_room_say_so(node: str) -> None:
    script = f"""
        import {{ Words }} from "{(PANEL / "words.js").as_uri()}";
        for (let n = 3; n <= 254; n++) labelmap.indexOf(one, `part ${{n}}`);
        const said = [];
        const panel = {{ shows: () => true, work: {{ complain: (text) => said.push(text) }} }};
        const automatic = {{ byHand: () => new Map(), mayReplace: async (byHand) => byHand }};
        const words = new Words({{ panel, automatic }}, "segment");
        const known = await words.keeps(one, mask("1000"), {{ 1: "liver" }});
        const unknown = await words.keeps(one, mask("1000"), {{ 1: "duct" }});
        console.log(JSON.stringify([known, unknown, said]));
    """
    said = "Nothing was pasted: the label map is full: it holds 254 structures"
    assert _told(node, script) == [[], None, [said]]


def test_any_change_of_voxels_is_seen(node: str) -> None:
    script = """
        const print = (text) => labelmap.printOf(mask(text));
        const all = ["0000", "1000", "0100", "0001", "2000", "0110", "1001", "1100", "0200"];
        console.log(JSON.stringify([new Set(all.map(print)).size, all.length, print("1100") === print("1100")]));
    """
    different, all_of_them, same = _told(node, script)
    assert different == all_of_them
    assert same


def test_nothing_reaches_the_label_map_of_another_image(node: str) -> None:
    """The second image comes on screen; what was meant for the first is refused or stays in its own."""
    script = """
        labelmap.paste(one, mask("1000"), { 1: "spleen" });
        labelmap.paste(one, mask("1100"), { 1: "liver" });
        await labelmap.ensure(two, []);
        labelmap.indexOf(one, "duct");
        const states = [
            await refused(() => labelmap.paste(one, mask("1111"), { 1: "liver" })),
            await refused(() => labelmap.stepOf(one, () => {})),
            await refused(() => labelmap.showEvidence(one, mask("1111"), "liver")),
            await refused(() => labelmap.voxels(image("1.3"))),
            names(one), names(two), Array.from(labelmap.voxels(two)),
        ];
        await labelmap.ensure(one, []);
        labelmap.paste(one, mask("0000"), { 1: "liver" });
        console.log(JSON.stringify([...states, Array.from(labelmap.voxels(one))]));
    """
    other = "another series is on screen now; nothing was pasted"
    gone = "the masks of this image are no longer in the viewer"
    known = "liver,spleen"
    under = [2, 0, 0, 0]
    assert _told(node, script) == [other, other, other, gone, f"{known},duct", known, [0, 0, 0, 0], under]


def test_evidence_that_is_made_too_late_goes_again(node: str) -> None:
    """The viewer makes its label map on whatever is on screen by then."""
    script = """
        let make;
        making.until = new Promise((resolve) => { make = resolve; });
        const showing = refused(() => labelmap.showEvidence(one, mask("1111"), "liver"));
        await labelmap.ensure(two, []);
        make();
        const late = [await showing, [...maps.keys()]];
        await labelmap.showEvidence(two, mask("0010"), "liver");
        console.log(JSON.stringify([...late, Array.from(maps.get("medvl-evidence").values)]));
    """
    refused = "another series is on screen now; nothing was pasted"
    assert _told(node, script) == [refused, ["1", "medvl-1.1"], [0, 0, 255, 0]]


def test_a_point_is_taken_away_once(node: str) -> None:
    """Two clicks on a list that was not drawn anew between them."""
    script = f"""
        import {{ Prompts }} from "{(PANEL / "prompts.js").as_uri()}";
        const prompts = new Prompts();
        for (const n of [1, 2, 3]) prompts.addPoint([n, n, n], 1);
        const [first, second] = prompts.points;
        for (const point of [first, second, first]) prompts.removePoint(point);
        console.log(JSON.stringify(prompts.points.map(({{ voxel }}) => voxel[0])));
    """
    assert _told(node, script) == [3]


def test_a_step_goes_back_and_forth_with_its_prompts(node: str) -> None:
    """All organs over a click's mask, a click on what they made, and undo over both in turn; hand edits stop it."""
    script = f"""
        import {{ Placed, Prompts }} from "{(PANEL / "prompts.js").as_uri()}";
        import {{ Steps }} from "{(PANEL / "steps.js").as_uri()}";
        const placed = new Placed();
        const work = {{ run: (kind, title, act) => act(), say: () => {{}} }};
        const steps = new Steps(work, placed);
        const told = [];
        const tell = (moved) => told.push([moved, labelmap.voxels(one).join(""), placed.of(one).get("liver")?.words]);
        const go = async (direction) => tell(await steps.move(one, direction, ""));
        const place = (words) => placed.of(one).set("liver", Object.assign(new Prompts(), {{ words }}));
        labelmap.paste(one, mask("1000"), {{ 1: "liver" }});
        place("first");
        steps.paste(one, mask("0110"), {{ 1: "liver", 2: "spleen" }});
        tell();
        place("second");
        labelmap.paste(one, mask("0111"), {{ 1: "liver" }});
        await go("undo"); // the masks are not as the step left them
        labelmap.paste(one, mask("0110"), {{ 1: "liver" }});
        await go("undo");
        await go("redo");
        steps.paste(one, mask("0110"), {{ 1: "liver" }}); // nothing changed: no step
        await go("undo");
        steps.placed(one);
        await go("redo");
        steps.paste(one, mask("1100"), {{ 1: "liver" }}, ["liver"]); // kept, and so are its prompts
        tell(steps.can(one, "undo"));
        console.log(JSON.stringify(told));
    """
    assert _told(node, script) == [
        [None, "0110", None],
        [False, "0111", "second"],
        [True, "1000", "first"],
        [True, "0110", "second"],
        [True, "1000", "first"],
        [False, "1000", "first"],
        [False, "1000", "first"],
    ]


def test_the_oldest_steps_go_when_they_take_much(node: str) -> None:
    script = f"""
        import {{ Placed }} from "{(PANEL / "prompts.js").as_uri()}";
        import {{ Steps }} from "{(PANEL / "steps.js").as_uri()}";
        const work = {{ run: (kind, title, act) => act(), say: () => {{}} }};
        const most = async (bytes) => {{
            const steps = new Steps(work, new Placed(), bytes);
            for (const one of ["1000", "1100", "0000"]) steps.paste(two, mask(one), {{ 1: "liver" }});
            const told = [];
            while (await steps.move(two, "undo", "")) told.push(labelmap.voxels(two).join(""));
            return told;
        }};
        await labelmap.ensure(two, []);
        console.log(JSON.stringify([await most(1e6), await most(18), await most(1)]));
    """
    # A changed voxel takes 6 bytes: 6, 6 and 12.
    assert _told(node, script) == [["1100", "1000", "0000"], ["1100", "1000"], ["1100"]]
