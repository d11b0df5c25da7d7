"""How a conversion shows how far it is."""

import io

from tools.conversion.jobs import Bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_on_a_terminal(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    with Bar("a -> b", 1000, True) as bar:
        bar.add(1000)
    assert (
        "a -> b: 100%" in screen.getvalue()
        and "B/s" in screen.getvalue()
        and "GB" not in screen.getvalue()
    )


def test_lines_elsewhere_and_none_before_a_minute_has_passed(monkeypatch):
    log, seconds = io.StringIO(), [100.0]
    monkeypatch.setattr("sys.stderr", log)
    monkeypatch.setattr("time.monotonic", lambda: seconds[0])
    with Bar("a -> b", 4_000_000_000, True) as bar:
        for now in (120.0, 159.0, 161.0, 180.0, 222.0):
            seconds[0] = now
            bar.add(500_000_000)
    assert log.getvalue() == "a -> b: 1.500 of 4.000 GB\na -> b: 2.500 of 4.000 GB\n"


def test_nothing_at_all_where_it_is_not_wanted(monkeypatch):
    for screen in (Terminal(), io.StringIO()):
        monkeypatch.setattr("sys.stderr", screen)
        monkeypatch.setattr(Bar, "SECONDS", 0)
        with Bar("a -> b", 1000, False) as bar:
            bar.add(1000)
        assert screen.getvalue() == ""
