"""Plugins as they are really installed: a module and a dist-info on the path of another process."""

import json
import os
import shutil
import sys
import textwrap
import threading

import pytest

import wmtp
from wmtp.plugins import Registry, load_plugins, loader

CONFIG_CLASS = """
import attrs, wmtp

@attrs.frozen(kw_only=True)
class Mine(wmtp.TrainerConfig):
    \"\"\"{type}'s documentation.\"\"\"
    type = "{type}"
    alpha: float = 1.0
    must: str

    def build(self):
        pass

@wmtp.hookimpl
def wmtp_trainers():
    return [Mine]
"""

HOOK = "import wmtp\n@wmtp.hookimpl\n"


#: ``wmtp …`` in a fork, which reads no PYTHONPATH by itself
COMMAND = """
import os, sys
sys.path[:0] = os.environ["PYTHONPATH"].split(os.pathsep)
from wmtp.cli import run_from_shell
run_from_shell()
"""


@pytest.fixture
def site(preloaded, tmp_path):
    """Install a distribution, and run the command line with all that were installed."""

    class Site:
        def install(self, name, code, *, entry=None, version="1.0", target=None):
            module = name.replace("-", "_")
            (tmp_path / f"{module}.py").write_text(textwrap.dedent(code))
            info = tmp_path / f"{module}-{version}.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
            (info / "entry_points.txt").write_text(f"[wmtp]\n{entry or name} = {target or module}\n")

        def wmtp(self, *arguments, **environment):
            env = {**os.environ, "PYTHONPATH": str(tmp_path), **environment}
            return preloaded.run(*arguments, code=COMMAND, env=env, cwd=tmp_path, timeout=300)

        def plugins(self, **environment):
            done = self.wmtp("plugins", "--json", **environment)
            return {(plugin["distribution"], plugin["name"]): plugin for plugin in json.loads(done.stdout)}

        def reason(self, name):
            plugin = self.plugins()[name, name]
            assert plugin["status"] == "broken"
            assert plugin["components"] == {}
            return plugin["reason"]

        def check(self, trainer, *more):
            (tmp_path / "a.toml").write_text(
                '[models.base]\ntype = "scratch"\nvocab_size = 300\n[datasets.py]\ntype = "python-source"\n'
                f'[trainer]\ntype = "{trainer}"\nmust = "x"\n'
            )
            return self.wmtp("check", "a.toml", *more)

    return Site()


def test_a_sound_plugin_is_used_and_listed(site):
    site.install("acme-mtp", "print('noise at import')\n" + CONFIG_CLASS.format(type="acme"), version="2.5")
    plugin = site.plugins()["acme-mtp", "acme-mtp"]
    assert plugin == {
        "name": "acme-mtp",
        "distribution": "acme-mtp",
        "version": "2.5",
        "status": "ok",
        "reason": None,
        "components": {"trainers": ["acme"]},
    }
    done = site.check("acme")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "ok")
    assert "acme-mtp 2.5" in done.stdout
    shown = site.wmtp("show", "acme").stdout
    assert "acme: a trainer, from acme-mtp 2.5" in shown
    assert "acme's documentation." in shown
    assert "must = …  # required: text" in shown
    assert "alpha = 1.0" in shown


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import nosuchmodule", "ModuleNotFoundError: No module named 'nosuchmodule' ("),
        ("def f(:\n", "SyntaxError: "),
        ("import sys; sys.exit('bye')", "SystemExit: bye ("),
        ("raise BaseException('odd')", "BaseException: odd ("),
        (HOOK + "def wmtp_trainer(): return []", "no hook 'wmtp_trainer'; did you mean 'wmtp_trainers'?"),
        (HOOK + "def wmtp_trainers(config): return []", "a hook takes no arguments: "),
        ("def wmtp_trainers(): return []", "wmtp_trainers lacks the decorator @wmtp.hookimpl"),
        ("x = 1", "broken has no function with @wmtp.hookimpl"),
        (HOOK + "def wmtp_trainers(): 1 / 0", "ZeroDivisionError: division by zero ("),
        (HOOK + "def wmtp_trainers(): return None", "wmtp_trainers must return a list of config classes, not None"),
        (HOOK + "def wmtp_trainers(): return int", "not the class int itself"),
        (HOOK + "def wmtp_trainers(): return [3]", "must return config classes, not 3 (int)"),
        (HOOK + "def wmtp_trainers(): return [int]", "int is no attrs class"),
        ("import wmtp\n@wmtp.hookimpl(wrapper=True)\ndef wmtp_trainers(): return (yield)", "is a wrapper"),
    ],
)  # fmt: skip
def test_a_broken_plugin_says_why(site, code, reason):
    site.install("broken", code)
    assert reason in site.reason("broken")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("@attrs.define\nclass A:\n    type = 'a'\n    def build(self): pass", "A is not frozen"),
        ("@attrs.frozen\nclass A:\n    def build(self): pass", "A has no name: write `type = \"my-trainer\"` in it"),
        ("@attrs.frozen\nclass A:\n    type: str = 'a'\n    def build(self): pass", "A.type is a field"),
        ("@attrs.frozen\nclass A:\n    type = 'a'", "A ('a') has no method build()"),
        ("@attrs.frozen\nclass A:\n    type = 'a'\n    def build(self, x): pass", "('a'): build is called as build(self),"),
        (
            "@attrs.frozen\nclass A:\n    type = 'a'\n    required_models = 'ref'\n    def build(self): pass",
            "A ('a'): required_models is a text; write ('ref',)",
        ),
        ("@attrs.frozen\nclass A:\n    type = 'a'\n    x = attrs.field()\n    def build(self): pass", "'x' has no type"),
        ("@attrs.frozen\nclass A:\n    type = 'a'\n    x: 'No'\n    def build(self): pass", "its fields cannot be found"),
    ],
)  # fmt: skip
def test_a_class_that_breaks_the_contract(site, body, reason):
    body = body.replace("class A:", "class A(wmtp.TrainerConfig):")
    site.install("broken", f"import attrs, wmtp\n{body}\n@wmtp.hookimpl\ndef wmtp_trainers(): return [A]")
    assert reason in site.reason("broken")


def test_a_broken_plugin_stops_only_those_who_need_it(site):
    site.install("acme", CONFIG_CLASS.format(type="acme"))
    site.install("broken", "import nosuchmodule", version="0.3")
    assert site.check("acme").returncode == 0
    done = site.check("other")
    assert done.returncode == 2
    assert "a.toml:7: trainer: no plugin provides 'other'; installed: acme" in done.stderr
    assert "the plugin broken 0.3 is broken: ModuleNotFoundError: No module named 'nosuchmodule'" in done.stderr
    assert "Traceback" not in done.stderr


def test_one_name_from_two_distributions_is_an_error_but_both_are_listed(site):
    site.install("one", CONFIG_CLASS.format(type="same"), version="1.1")
    site.install("two", CONFIG_CLASS.format(type="same"), version="2.2")
    done = site.check("baseline-mtp")
    assert done.returncode == 1
    assert "the trainer 'same' is provided by one 1.1 and by two 2.2" in done.stderr
    listed = site.wmtp("plugins")
    assert listed.returncode == 1
    assert "one 1.1: ok" in listed.stdout
    assert "two 2.2: ok" in listed.stdout
    assert "provided by one 1.1 and by two 2.2" in listed.stderr


@pytest.mark.parametrize("names", [("one", "two"), ("one", "one")])
def test_two_packages_without_metadata_are_named_by_their_folders(names, tmp_path, monkeypatch):
    for number, name in enumerate(names):
        place = tmp_path / str(number)
        info = place / f"{name}-{number}.5.dist-info"
        info.mkdir(parents=True)
        (info / "entry_points.txt").write_text(f"[wmtp]\nentry = clash{number}\n")
        (place / f"clash{number}.py").write_text(CONFIG_CLASS.format(type="clash"))
        monkeypatch.syspath_prepend(place)
        monkeypatch.delitem(sys.modules, f"clash{number}", raising=False)
    monkeypatch.setenv("WMTP_PLUGINS", "entry")
    registry = load_plugins()
    found = [str(plugin) for plugin in registry.plugins if plugin.name == "entry"]
    if names[0] == names[1]:  # a second copy further down the path, which Python would not import
        assert found == ["one 1.5"]
        return
    assert found == ["one 0.5", "two 1.5"]
    with pytest.raises(wmtp.PluginError, match=r"the trainer 'clash' is provided by one 0\.5 and by two 1\.5; uninstall"):
        registry.require_unambiguous()


def test_one_package_that_provides_a_component_twice_is_told_by_entry_points(tmp_path, monkeypatch):
    info = tmp_path / "one-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: one\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[wmtp]\na = twice_a\nb = twice_b\n")
    for name in "ab":
        (tmp_path / f"twice_{name}.py").write_text(CONFIG_CLASS.format(type="clash"))
        monkeypatch.delitem(sys.modules, f"twice_{name}", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("WMTP_PLUGINS", "a,b")
    said = r"by one 1\.0 \(entry point a, twice_a\.Mine\) and by one 1\.0 \(entry point b, twice_b\.Mine\)"
    with pytest.raises(wmtp.PluginError, match=said):
        load_plugins().require_unambiguous()


def test_one_scheme_from_two_distributions_is_an_error_that_names_both(site):
    storage = (
        "import attrs, wmtp\n@attrs.frozen\nclass A(wmtp.StorageBackendConfig):\n    type = '{0}'\n"
        "    schemes = ('mem',)\n    def build(self): pass\n"
    )
    hook = "@wmtp.hookimpl\ndef wmtp_storages(): return [A]\n"
    site.install("one", storage.format("memory") + hook, version="1.1")
    site.install("two", storage.format("ram") + hook, version="2.2")
    done = site.check("baseline-mtp")
    assert done.returncode == 1
    assert "the storage of mem:// URIs is provided by one 1.1 and by two 2.2" in done.stderr


def test_two_distributions_with_one_entry_name_are_both_seen(site):
    site.install("one", CONFIG_CLASS.format(type="first"), entry="shared")
    site.install("two", CONFIG_CLASS.format(type="second"), entry="shared")
    assert {("one", "shared"), ("two", "shared")} <= set(site.plugins())
    assert site.check("first").returncode == site.check("second").returncode == 0


def test_wmtp_plugins_limits_what_is_loaded(site):
    site.install("one", CONFIG_CLASS.format(type="first"))
    site.install("two", "raise SystemExit")
    assert set(site.plugins(WMTP_PLUGINS="one")) == {("wmtp-core", "wmtp-core"), ("one", "one")}
    assert set(site.plugins(WMTP_PLUGINS="")) == {("wmtp-core", "wmtp-core")}
    done = site.wmtp("plugins", WMTP_PLUGINS="onne,two")
    assert done.returncode == 2
    assert "error: WMTP_PLUGINS: no plugin 'onne' is installed; did you mean 'one'?" in done.stderr


def test_a_plugin_that_changes_the_working_folder_moves_no_path(site):
    site.install("mover", "import os\nos.chdir('/')\n" + CONFIG_CLASS.format(type="mover"))
    done = site.check("mover")
    assert done.returncode == 0, done.stderr
    assert "the plugin mover 1.0 changes the working folder when it is imported; it is set back" in done.stderr


def test_a_damaged_installation_locks_nobody_out(site, tmp_path):
    site.install("acme", CONFIG_CLASS.format(type="acme"))
    site.install("bent", "", version="3.0")
    (tmp_path / "bent-3.0.dist-info/entry_points.txt").write_text("[wmtp]\nno equals sign\n")
    site.install("nameless", "", version="1.0")
    (tmp_path / "nameless-1.0.dist-info/METADATA").unlink()
    site.install("other", "", version="1.0")
    (tmp_path / "other-1.0.dist-info/entry_points.txt").write_bytes(b"\xff\xfe[")
    plugins = site.plugins()
    assert plugins["acme", "acme"]["status"] == "ok"
    assert plugins["bent", "bent"]["reason"].startswith("its entry_points.txt is damaged")
    assert plugins["nameless", "nameless"]["status"] == "broken"
    assert site.check("acme").returncode == 0


def test_the_first_of_two_copies_counts(site, tmp_path, monkeypatch):
    site.install("acme", CONFIG_CLASS.format(type="acme"), version="2.0")
    later = tmp_path / "later"
    shutil.copytree(tmp_path, later, ignore=shutil.ignore_patterns("later"))
    found = site.wmtp("plugins", "--json", PYTHONPATH=f"{tmp_path}{os.pathsep}{later}")
    assert [plugin["name"] for plugin in json.loads(found.stdout)].count("acme") == 1


def test_a_package_that_is_installed_meanwhile_is_found(site, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    assert "acme-late" not in {plugin.name for plugin in load_plugins().plugins}
    site.install("acme-late", CONFIG_CLASS.format(type="late"))
    assert "late" in {provided.type for provided in load_plugins().of_kind("trainers")}


def test_loading_again_reads_and_checks_nothing_again(monkeypatch):
    first = load_plugins()
    monkeypatch.setattr(loader, "contract_problem", lambda kind, cls: f"checked {cls} again")
    monkeypatch.setattr(loader.metadata, "distributions", list)
    assert [plugin.reason for plugin in load_plugins().plugins] == [plugin.reason for plugin in first.plugins]


def test_an_object_may_be_the_plugin(site):
    code = CONFIG_CLASS.format(type="object").partition("@wmtp.hookimpl")[0] + (
        "class Plugin:\n    @wmtp.hookimpl\n    def wmtp_trainers(self):\n        return [Mine]\nplugin = Plugin()\n"
    )
    site.install("obj", code, target="obj:plugin")
    assert site.plugins()["obj", "obj"]["components"] == {"trainers": ["object"]}


def test_a_missing_component_names_the_package_that_has_more_of_its_kind():
    assert "the package wmtp-vessl has launchers: pip install wmtp-vessl" in Registry((), ()).missing("launchers", "vessl")
    assert Registry((), ()).missing("trainers", "rho1-wmtp") == (
        "no plugin provides 'rho1-wmtp'; installed: none; the package wmtp-algos has trainers: pip install wmtp-algos"
    )


def test_threads_that_load_plugins_at_once_leave_standard_output_in_its_place(monkeypatch):
    """Each would restore what it found, and the last one found what the first had redirected."""
    before, inside, first_left = sys.stdout, threading.Barrier(2), threading.Event()
    components = loader._components

    def slow(source):
        try:
            inside.wait(timeout=0.2)
        except threading.BrokenBarrierError:  # behind a lock the second does not come
            return components(source)
        if threading.current_thread().name == "second":
            first_left.wait(timeout=10)
        return components(source)

    def load():
        load_plugins()
        first_left.set()

    monkeypatch.setattr(loader, "_components", slow)
    threads = [threading.Thread(target=load, name=name) for name in ("first", "second")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sys.stdout is before
