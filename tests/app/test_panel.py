"""The companion panel's files, and OHIF's page with the tags that load it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import monailabel.endpoints.ohif as ohif_endpoint
import pytest

from app.conftest import APP, Running

PANEL = APP / "lib" / "panel"
OHIF = Path(ohif_endpoint.__file__).parent / "static" / "ohif"


@pytest.mark.parametrize("path", ["", "monai-label", "viewer/somewhere/deep", "index.html"])
def test_every_page_of_the_viewer_loads_the_panel_once(running: Running, path: str) -> None:
    page = running.client.get(f"/ohif/{path}", params={"StudyInstanceUIDs": "1.2.3"})
    original = (OHIF / "index.html").read_text(encoding="utf-8")
    assert page.headers["content-type"].startswith("text/html")
    added = re.findall(
        r'<link href="/medvl/panel/[^>]*><script type="module" src="/medvl/panel/[^>]*></script>', page.text
    )
    assert len(added) == 1
    assert page.text.replace(added[0], "") == original, "nothing else of the page changed"
    for address in re.findall(r'(?:src|href)="(/medvl/[^"]*)"', added[0]):
        assert running.client.get(address).status_code == 200


@pytest.mark.parametrize("name", ["app-config.js", "app.bundle.css", "manifest.json"])
def test_other_files_of_the_viewer_are_untouched(running: Running, name: str) -> None:
    assert running.client.get(f"/ohif/{name}").content == (OHIF / name).read_bytes()


@pytest.mark.parametrize("path", sorted(PANEL.iterdir()), ids=lambda path: path.name)
def test_files_of_the_panel(running: Running, path: Path) -> None:
    reply = running.client.get(f"/medvl/panel/{path.name}")
    assert reply.status_code == 200
    assert reply.headers["content-type"].split(";")[0] in ("text/javascript", "text/css")
    assert reply.content == path.read_bytes()
    assert len(reply.text.splitlines()) <= 400
    for address in re.findall(r'(?:from|import) "\./([\w.]+)"', reply.text):
        assert (PANEL / address).is_file(), f"{path.name} imports {address}"
    assert "http://" not in reply.text.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in reply.text, "the panel needs no other site"


@pytest.mark.parametrize("name", ["../__init__.py", "..%2F__init__.py", "nothing.js", "panel", "%2e%2e%2fserver.py"])
def test_nothing_else_is_handed_out(running: Running, name: str) -> None:
    reply = running.client.get(f"/medvl/panel/{name}")
    assert reply.status_code == 404


@pytest.fixture
def node() -> str:
    found = shutil.which("node")
    if found is None:
        pytest.skip("node is not installed; it runs the panel's modules outside a browser")
    return found


def run_node(node: str, script: str) -> str:
    """What a script in the panel's folder prints."""
    command = [node, "--input-type=module", "-e", script]
    return subprocess.run(command, cwd=PANEL, capture_output=True, text=True, check=True, timeout=60).stdout.strip()


def test_masks_survive_writing_and_reading(node: str, tmp_path: Path) -> None:
    """What the panel sends is NRRD that other readers place in the same spot, and it reads what it wrote."""
    import nrrd
    import numpy as np

    file = tmp_path / "mask.nrrd"
    script = f"""
        import {{ readNrrd, writeNrrd }} from "{(PANEL / "nrrd.js").as_uri()}";
        import {{ writeFileSync }} from "node:fs";
        const grid = {{ sizes: [2, 3, 4], axes: [[0, 2, 0], [-1.5, 0, 0], [0, 0, 3]], origin: [10, -20, 30.5] }};
        const voxels = Uint8Array.from({{ length: 24 }}, (_, n) => n);
        const blob = await writeNrrd(grid, voxels);
        writeFileSync("{file}", Buffer.from(await blob.arrayBuffer()));
        const back = await readNrrd(await blob.arrayBuffer());
        console.log(JSON.stringify([back.sizes, back.axes, back.origin, Array.from(back.voxels)]));
    """
    expected = "[[2,3,4],[[0,2,0],[-1.5,0,0],[0,0,3]],[10,-20,30.5],[" + ",".join(map(str, range(24))) + "]]"
    assert run_node(node, script) == expected
    voxels, header = nrrd.read(str(file), index_order="F")
    np.testing.assert_array_equal(voxels, np.arange(24, dtype=np.uint8).reshape(2, 3, 4, order="F"))
    np.testing.assert_array_equal(header["space directions"], [[0, 2, 0], [-1.5, 0, 0], [0, 0, 3]])
    np.testing.assert_array_equal(header["space origin"], [10, -20, 30.5])


def test_prompts_go_back_and_forth(node: str) -> None:
    script = f"""
        import {{ Prompts, fingerprints }} from "{(PANEL / "prompts.js").as_uri()}";
        const prompts = new Prompts();
        prompts.addPoint([1, 2, 3], 1); prompts.answered();
        prompts.addPoint([4, 5, 6], 0); prompts.setBox([9, 1, 5], [2, 8, 5]); prompts.answered();
        const states = [prompts.asParams("liver")];
        prompts.undone(); states.push(prompts.asParams("liver"));
        prompts.undone(); states.push(prompts.empty, prompts.canUndo, prompts.canRedo);
        prompts.redone(); states.push(prompts.points.length);
        prompts.addPoint([7, 7, 7], 1); prompts.answered(); states.push(prompts.canRedo);
        const [a, b] = [[0, 1, 1, 0], [0, 1, 0, 1]].map((values) => fingerprints(Uint8Array.from(values)));
        states.push(a[1] === b[1], a[2] === b[2]);
        const [c, d] = [[0, 1, 0, 0, 1], [0, 0, 1, 1, 0]].map((values) => fingerprints(Uint8Array.from(values)));
        states.push(c[1] === d[1]);
        const late = new Prompts();
        late.addPoint([1, 1, 1], 1);
        const sent = late.snapshot();
        late.addPoint([2, 2, 2], 1); late.answered(sent); late.answered(); late.undone();
        states.push(late.points.length);
        console.log(JSON.stringify(states));
    """
    both = '{"label":"liver","foreground":[[1,2,3]],"background":[[4,5,6]],"box":[[2,1,5],[9,8,5]]}'
    first = '{"label":"liver","foreground":[[1,2,3]],"background":[]}'
    assert run_node(node, script) == f"[{both},{first},true,false,true,1,false,false,true,false,1]"


def test_a_mask_made_by_hand_between_prompts_is_a_step(node: str) -> None:
    """Undo comes by it, and what was never answered falls back to it."""
    script = f"""
        import {{ Prompts, isEmpty }} from "{(PANEL / "prompts.js").as_uri()}";
        const prompts = new Prompts();
        const told = () => [prompts.start, prompts.points.length, prompts.past.length, prompts.canRedo];
        prompts.startFrom("found");
        prompts.addPoint([1, 1, 1], 1); prompts.answered();
        prompts.addPoint([2, 2, 2], 1); prompts.answered();
        prompts.undone();
        prompts.startFrom("painted");
        const states = [prompts.base, told()];
        prompts.addPoint([3, 3, 3], 1); prompts.revert(); states.push(told());
        prompts.addPoint([4, 4, 4], 1); prompts.answered(); states.push(told());
        states.push(isEmpty(prompts.stepTo("undo")), prompts.stepTo("undo").start);
        prompts.undone(); states.push(told());
        states.push(isEmpty(prompts.stepTo("undo")), prompts.stepTo("undo").start);
        prompts.undone(); states.push(told());
        console.log(JSON.stringify(states));
    """
    by_hand = '["painted",0,2,false]'
    assert run_node(node, script) == (
        f'["found",{by_hand},{by_hand},["painted",1,3,false],true,"painted",'
        '["painted",0,2,true],false,"found",["found",1,1,true]]'
    )


def test_what_a_structure_covers_comes_back_only_while_it_is_true(node: str) -> None:
    """1 and 2 are placed over each other, removed, and painted on by another tool in between."""
    script = f"""
        import {{ Layers }} from "{(PANEL / "layers.js").as_uri()}";
        const table = (...values) => Uint8Array.from({{ length: 256 }}, (_, n) => (values.includes(n) ? 1 : 0));
        const states = [];
        function begin() {{
            const map = {{ layers: new Layers(5), now: new Uint8Array(5) }};
            map.place = (wanted, replaced, locked = []) => {{
                map.now = map.layers.place(map.now, Uint8Array.from(wanted), table(...replaced), table(...locked));
                return map;
            }};
            map.tell = () => states.push(map.now.join(""));
            return map;
        }}
        const covered = () => begin().place([1, 1, 1, 0, 0], [1]).place([0, 2, 2, 2, 0], [2]);
        const none = [0, 0, 0, 0, 0];
        covered().tell();
        covered().place(none, [2]).tell();                     // what was covered is back
        covered().place(none, [1]).place(none, [2]).tell();    // 1 went first: it does not come back
        covered().place([1, 0, 0, 0, 1], [1]).place(none, [2]).tell(); // 1 was told anew meanwhile
        covered().place(none, [2], [2]).tell();                // locked
        let map = covered();
        map.now[1] = 0;                                        // rubbed out by hand, then covered again
        map.place([0, 2, 2, 2, 0], [2]).place(none, [2]).tell();
        map = covered();
        map.now[1] = 3;                                        // painted over by hand, then removed
        map.place(none, [3]).tell();
        map = covered();
        map.layers.reset(Uint8Array.from([2, 2, 0, 0, 0]));    // another version was opened
        map.now = Uint8Array.from([2, 2, 0, 0, 0]);
        map.place(none, [2]).tell();
        map = covered();
        map.now[1] = 3;                                        // painted over by hand: that is all there is
        map.layers.settle(map.now);
        map.place(none, [3]).tell();
        console.log(states.join(" "));
    """
    assert run_node(node, script) == "12220 11100 00000 10001 12220 10100 10220 00000 10220"


def test_what_is_no_longer_automatic(node: str) -> None:
    """1 and 2 are automatic; 3 is placed on them, and they are painted on."""
    script = f"""
        import {{ changedSince, madeAnew }} from "{(PANEL / "automatic.js").as_uri()}";
        const map = (text) => Uint8Array.from(text, Number);
        const named = (table) => Array.from(table).flatMap((is, value) => (is ? [value] : [])).join("") || "none";
        const told = (...values) => Uint8Array.from({{ length: 256 }}, (_, n) => (values.includes(n) ? 1 : 0));
        const made = madeAnew(null, map("000400"), map("112400"), told(1, 2));
        const say = (text) => named(changedSince(made, map(text)));
        console.log(
            made.join(""), say("112400"), say("132400"), say("100400"), say("112411"), say("122400"),
            changedSince(null, map("1"))[1],
            madeAnew(made, map("132400"), map("132440"), told(4)).join(""),
            madeAnew(made, map("132400"), map("231400"), told(2)).join(""),
        );
    """
    # The last: 2 went from the third voxel, and the 1 that came to light under it is as automatic as it was.
    assert run_node(node, script) == "112000 4 34 124 14 24 1 112440 211000"


def test_what_words_take(node: str) -> None:
    """1 is an organ, 2 and 3 are lesions."""
    script = f"""
        import {{ changedBy, lesionFor }} from "{(PANEL / "words.js").as_uri()}";
        const map = (text) => Uint8Array.from(text, Number);
        const told = (...values) => Uint8Array.from({{ length: 256 }}, (_, n) => (values.includes(n) ? 1 : 0));
        const named = (table) => Array.from(table).flatMap((is, value) => (is ? [value] : [])).join("") || "none";
        const change = (wanted, ...values) => named(changedBy(map("11230"), map(wanted), told(...values), told(2, 3)));
        const lesions = {{ lesion: 2, "lesion 2": 3 }};
        const lesion = (mask, ...taken) => lesionFor(map("0223000"), (n) => mask[n] === "1", lesions, taken);
        console.log(
            change("11100", 1), change("11000", 1), change("10000", 1), change("02200", 2), change("00220", 2),
            change("00200", 2), change("00000", 1, 2), "/",
            lesion("0111000"), lesion("0001000"), lesion("0000110"), lesion("0000110", "lesion 3"),
            lesion("0100000", "lesion"), lesionFor(map("00"), () => true, {{}}, []),
        );
    """
    taken = "12 none 01 2 23 none 012"  # 0 is what is nothing
    assert run_node(node, script) == f"{taken} / lesion lesion 2 lesion 3 lesion 4 lesion 3 lesion"


def test_prompts_stay_with_their_series(node: str) -> None:
    script = f"""
        import {{ Placed, Prompts }} from "{(PANEL / "prompts.js").as_uri()}";
        const placed = new Placed();
        const [one, two] = [{{ series: "1.1" }}, {{ series: "1.2" }}];
        placed.of(one).set("liver", new Prompts());
        placed.of(one).get("liver").addPoint([1, 2, 3], 1);
        placed.of(two).set("liver", new Prompts());
        const told = (image) => placed.record(image).map((item) => item.points[0].voxel.join(""));
        const states = [told(one), told(two), [...placed.of(null)]];
        placed.forget(two);
        states.push(told(one));
        placed.forget(one);
        states.push(told(one));
        console.log(JSON.stringify(states));
    """
    assert run_node(node, script) == '[["123"],[],[],["123"],[]]'


def test_a_tab_has_an_id_of_its_own(node: str) -> None:
    """A duplicated tab begins with its original's storage; a page that is loaded again finds what it left."""
    script = f"""
        const storage = (items = {{}}) => ({{
            getItem: (key) => items[key] ?? null,
            setItem: (key, value) => {{ items[key] = value; }},
            removeItem: (key) => {{ delete items[key]; }},
            copy: () => storage({{ ...items }}),
        }});
        let pages = 0;
        async function page(session) {{
            const listeners = {{}};
            globalThis.sessionStorage = session;
            globalThis.window = {{ addEventListener: (name, then) => {{ listeners[name] = then; }} }};
            const {{ clientId }} = await import("{(PANEL / "annotator.js").as_uri()}?" + pages++);
            return {{ id: clientId(), again: clientId(), leave: () => listeners.pagehide(), session }};
        }}
        const first = await page(storage());
        const twin = await page(first.session.copy());
        globalThis.sessionStorage = first.session;
        first.leave();
        const reloaded = await page(first.session);
        console.log(first.id === first.again, twin.id === first.id, reloaded.id === first.id);
    """
    assert run_node(node, script) == "true false true"
