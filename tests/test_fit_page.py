"""The page "Will it fit?": its table, and what it shows in headless Chromium.

The pages are those in the folder that SITE names, as .ci/run builds them, or are built
here where mkdocs is installed.
"""

import functools
import html
import http.server
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import jax
import pytest

from benchmarks import fit_table
from ldadam_optax import memory_report

# Choices on the page, of which each takes sums of its own; and as ldadamw's options.
EIGHT_BITS = {"mu_dtype": "int8", "nu_dtype": "int8", "projector_dtype": "bfloat16"}
LDADAMW = {"optimizer": "ldadamw", "memory": "16"}
CHOICES = [
    (
        LDADAMW
        | {"model": "7b", "rank": "1024", "lost": "int8", "kept": "8bit"}
        | {"devices": "16", "weights": "bfloat16"},
        {"error_dtype": "int8", **EIGHT_BITS},
    ),
    (  # 5,461 hidden units, which no mesh divides
        LDADAMW
        | {"model": "1b", "rank": "128", "lost": "recovery", "kept": "float32"}
        | {"devices": "4", "weights": "float32"},
        {"residual": "recovery"},
    ),
    (
        {"optimizer": "adamw", "model": "130m", "moments": "int8", "devices": "8"}
        | {"weights": "float32", "memory": "0.1"},
        {"mu_dtype": "int8", "nu_dtype": "int8"},
    ),
]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# Chooses on the page as a reader does; reads it, and again from its new address.
DRIVER = """
<iframe id="page" src="fit/"></iframe><pre id="found"></pre><script>
const choices = CHOICES, page = document.getElementById("page");
const shown = () => new Promise((resolve) => {
  const look = () => {
    const form = page.contentDocument?.getElementById("fit");
    form && !form.hidden ? resolve(form) : setTimeout(look, 10);
  };
  page.onload = look;
});
const read = () => Object.fromEntries([
  ...[...page.contentDocument.querySelectorAll("#fit-bytes td[data-of]")].map(
    (cell) => [`${cell.dataset.on} ${cell.dataset.of}`, +cell.dataset.bytes]),
  ["verdict", page.contentDocument.getElementById("fit-verdict").textContent],
]);
(async () => {
  let form = await shown();
  const found = [];
  for (const choice of choices) {
    for (const [name, value] of Object.entries(choice)) {
      form[name].value = value;
      form[name].dispatchEvent(new Event("input", { bubbles: true }));
    }
    const before = read(), again = shown();
    page.src = page.contentWindow.location.href;
    form = await again;
    found.push([before, read()]);
  }
  document.getElementById("found").textContent = JSON.stringify(found);
})();
</script>
"""


@functools.cache
def expected(i):
    """Bytes of the weights and the state on each device, by the report alone."""
    choice, options = CHOICES[i]
    model = fit_table.Model(choice["model"])
    routing = model.routing
    if choice["optimizer"] == "adamw":
        routing = jax.tree.map(lambda _: None, model.params)
    sizes = []
    for devices in (int(choice["devices"]), 1):
        mesh, specs = model.placed(devices)
        report = memory_report(
            model.params,
            int(choice.get("rank", 1)),
            specs=specs,
            mesh=mesh,
            weight_dimension_numbers=routing,
            **options,
        )
        sizes.append(report.total.device)
        assert devices > 1 or report.total.device == report.total.state
    return sizes, report.total.parameter // 4  # a parameter of float32 each


@pytest.fixture(scope="module")
def table():
    return json.loads(fit_table.PATH.read_text())


@pytest.mark.parametrize("i", range(len(CHOICES)))
def test_the_table_is_what_the_report_tells(i, table):
    """A sum of two entries is the state under both options; no formula of our own."""
    choice, _ = CHOICES[i]
    (device, total), parameters = expected(i)
    model = table["models"][choice["model"]]
    for devices, size in ((int(choice["devices"]), device), (1, total)):
        place = table["devices"].index(devices)
        if choice["optimizer"] == "adamw":
            found = model["adamw"][choice["moments"]][place]
        else:
            kept = model["kept"][choice["rank"]][choice["kept"]][place]
            found = kept + model["lost"][choice["lost"]][place]
        assert found == size
    assert model["parameters"] == parameters
    assert model["weights"]["bfloat16"][0] == 2 * parameters


def test_a_new_table_has_the_entries_of_the_old(table):
    made = fit_table.of_model("tiny", devices=(8,))
    place = table["devices"].index(8)
    is_list = lambda node: isinstance(node, list)
    at_8 = lambda tree: jax.tree.map(
        lambda x: [x[place]] if is_list(x) else x, tree, is_leaf=is_list
    )
    assert made == at_8(table["models"]["tiny"])
    assert list(table["devices"]) == list(fit_table.DEVICES)
    assert table["models"].keys() == fit_table.SIZES.keys()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built pages."""
    if os.environ.get("SITE"):
        return Path(os.environ["SITE"])
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("no built pages: set SITE, or install '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "-q", "--site-dir", str(folder)]
    subprocess.run(build, check=True, cwd=Path(__file__).parents[1])
    return folder


@pytest.fixture(scope="module")
def address(site):
    """Where the pages are served, and the driver beside them."""
    driver = DRIVER.replace("CHOICES", json.dumps([choice for choice, _ in CHOICES]))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            if self.path != "/driver":
                return super().do_GET()
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            return self.wfile.write(driver.encode())

        def log_message(self, *_):
            pass

    handler = functools.partial(Handler, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_the_page_shows_what_the_report_tells(address, tmp_path):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    flags += [f"--user-data-dir={tmp_path}", "--virtual-time-budget=60000"]
    shown = subprocess.run(
        [browser, *flags, "--dump-dom", f"{address}/driver"],
        capture_output=True,
        check=True,
        text=True,
        timeout=120,
    ).stdout
    text = re.search(r'<pre id="found">(.*?)</pre>', shown, re.DOTALL)
    assert text, shown
    assert text[1], shown
    for i, (found, again) in enumerate(json.loads(html.unescape(text[1]))):
        choice, _ = CHOICES[i]
        assert again == found  # the address holds the choice
        (device, total), parameters = expected(i)
        itemsize = 2 if choice["weights"] == "bfloat16" else 4
        assert found["device state"] == device
        assert found["all state"] == total
        assert found["all weights"] == found["all gradients"] == itemsize * parameters
        parts = ("weights", "gradients", "state")
        for on in ("device", "all"):
            assert found[f"{on} sum"] == sum(found[f"{on} {part}"] for part in parts)
        fits = found["device sum"] <= float(choice["memory"]) * 2**30
        assert found["verdict"].startswith("Fits" if fits else "Does not fit")
