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
    begin = f'import {{ printOf }} from "{(PANEL / "prompts.js").as_uri()}";'
    script = """
        const print = (text) => printOf(mask(text));
        const all = ["0000", "1000", "0100", "0001", "2000", "0110", "1001", "1100", "0200"];
        console.log(JSON.stringify([new Set(all.map(print)).size, all.length, print("1100") === print("1100")]));
    """
    different, all_of_them, same = _told(node, begin + script)
    assert different == all_of_them
    assert same


_ABSENT = f"""
    globalThis.window = {{}};
    globalThis.location = {{ pathname: "/ohif/monai-label", search: "?StudyInstanceUIDs=1.2" }};
    const {{ Absent, whyAbsent }} = await import("{(PANEL / "absent.js").as_uri()}");
    const asked = [];
    function server(health, series, metadata) {{
        globalThis.fetch = async (url) => {{
            const [, name] = /(health|series|metadata)$/.exec(url.pathname);
            asked.push(name);
            const [status, body] = {{ health, series, metadata }}[name];
            return new Response(status === 204 ? null : JSON.stringify(body), {{ status }});
        }};
    }}
    const well = [200, {{ dicomweb_reachable: true, reasons: [] }}];
    const of = (...names) => [200, names.map((name) => ({{ "00080060": {{ vr: "CS", Value: [name] }} }}))];
"""


def test_why_no_image_comes(node: str) -> None:
    script = """
        const reasons = ["only 3 MB of disk are free", "the DICOMweb server x: it cannot be reached"];
        const told = [];
        for (const answers of [
            [[503, { dicomweb_reachable: false, reasons }]],
            [well, [502, { detail: "it is away" }]],
            [well, [200, []]],
            [well, [204, null]],
            [well, [403, "keep out"]],
            [well, of("SR", "SEG", "SR")],
            [well, of("SR", "CT"), [502, "x".repeat(1000)]],
            [well, of("SR", "CT"), [404, { detail: "gone" }]],
            [well, of("MR"), [200, []]],
        ]) {
            server(...answers);
            told.push(await whyAbsent("1.2"));
        }
        globalThis.fetch = async () => { throw new TypeError("away"); };
        told.push(await whyAbsent("1.2"));
        console.log(JSON.stringify(told));
    """
    assert json.loads(run_node(node, _ABSENT + script)) == [
        "The DICOM server does not answer (the DICOMweb server x: it cannot be reached)",
        "The DICOM server does not answer (502: it is away)",
        "The DICOM server has no study 1.2",
        "The DICOM server has no study 1.2",
        'The DICOM server does not give this study (403: "keep out")',
        "The study has no CT or MR series (but SR, SEG)",
        f'The DICOM server does not answer (502: "{"x" * 199})',
        "The DICOM server has no study 1.2 (404: gone)",
        "The viewer shows no image of this study",
        "The server cannot be reached; is it running?",
    ]


def test_it_is_asked_once_and_only_before_an_image(node: str) -> None:
    """The clock is ours: ten seconds of a visit without an image, then one question, and none after an image came."""
    script = """
        let now = 0;
        Date.now = () => now;
        globalThis.document = { createElement: () => ({ append() {}, addEventListener() {}, setAttribute() {} }) };
        let line = "";
        const absent = new Absent({ replaceChildren: (...children) => { line = String(children[0] ?? ""); } });
        server(well, [200, []]);
        const told = [];
        async function look(at, image = null) {
            now = at;
            absent.look(image);
            await new Promise((resolve) => setTimeout(resolve, 20));
            told.push([line, asked.length]);
        }
        await look(0);
        await look(9_000);
        await look(11_000);
        await look(50_000);
        location.search = "?StudyInstanceUIDs=1.3";
        await look(51_000);
        await look(52_000, {});
        line = "CT of 1.3"; // the panel's
        await look(70_000, {});
        await look(71_000);
        await look(90_000);
        location.pathname = "/ohif/viewer";
        await look(100_000);
        await look(120_000);
        console.log(JSON.stringify(told));
    """
    none, missing, shown = "No image on screen yet", "The DICOM server has no study 1.2 ", "CT of 1.3"
    assert json.loads(run_node(node, _ABSENT + script)) == [
        [none, 0], [none, 0], [missing, 2], [missing, 2],
        [none, 2], ["", 2], [shown, 2], [none, 2], [none, 2],
        ["[object Object]", 2], ["[object Object]", 2],
    ]  # fmt: skip


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
        labelmap.paste(one, mask("0000"), {{ 1: "liver" }});
        steps.paste(one, mask("0000"), {{ 1: "liver" }}, [], true); // cleared, with prompts that found nothing
        tell();
        await go("undo");
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
        [None, "0000", None],
        [True, "0000", "first"],
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


def test_what_needs_saving_and_whose_vote_it_is(node: str) -> None:
    """A consensus that was cleared and put back is still one; a label map made anew is not the one that was saved."""
    script = f"""
        const element = () => ({{
            append() {{}}, replaceChildren() {{}}, addEventListener() {{}}, setAttribute() {{}},
            querySelectorAll: () => [], dataset: {{}}, style: {{}},
        }});
        globalThis.document = {{ createElement: element }};
        globalThis.localStorage = globalThis.sessionStorage = {{ getItem: () => "ann", setItem() {{}} }};
        globalThis.location = {{ pathname: "", search: "", href: "http://here/" }};
        const {{ Labels }} = await import("{(PANEL / "labels.js").as_uri()}");
        const work = {{ busy: () => false, onChange() {{}}, say() {{}} }};
        const labels = new Labels({{ image: () => one, shows: () => true, work, segment: {{ forget() {{}} }} }});
        const told = [];
        const put = (text) => {{
            labelmap.put(mask(text));
            labels.changed(one);
            told.push([text, labels.unsaved().length, labels.consensusOn.has(one.series)]);
        }};
        put("1100");
        labels.saved(one);
        labels.markConsensus(one, {{ versions: [1, 2], source: "consensus-majority" }});
        for (const text of ["1100", "0000", "1100", "1000", "1100"]) put(text);
        labels.saved(one);
        labels.forget(one); // back to the list, opened again
        put("1100");
        console.log(JSON.stringify(told));
    """
    assert _told(node, script) == [
        ["1100", 1, False],
        ["1100", 0, True],
        ["0000", 0, True],
        ["1100", 0, True],
        ["1000", 1, False],
        ["1100", 1, False],
        ["1100", 1, False],
    ]
