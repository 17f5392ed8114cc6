"""Scripts that complete commands in a shell: groups, verbs, options, values of options, files.

They are made from the parsers, so that options are listed only once. A bundle's arguments are not completed.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tilewright.cli.commands import COMPLETION, GROUPS, SHELLS, parser, within

__all__ = ["script"]

FILES, FOLDERS = "@files", "@folders"
FOLDER_METAVARS = ("DIR", "BUNDLE")  # names of folders in the help


@dataclass(frozen=True)
class _Verb:
    """The words that may follow a verb."""

    words: str  # the group and the verb
    options: dict[str, str]  # option -> its help
    values: dict[str, str]  # option that takes a value -> the choices, FILES, FOLDERS or nothing
    places: list[tuple[str, str]]  # arguments without a name: their number, or * for any, and the same of each


def script(shell: str) -> str:
    """The script for a shell, to be read when the shell starts."""
    verbs = list(_verbs())
    return _fish(verbs) if shell == "fish" else _posix(verbs) + (ZSH if shell == "zsh" else BASH)


def _verbs() -> Iterator[_Verb]:
    yield _Verb(COMPLETION, {"--help": "show the help and exit"}, {}, [("0", " ".join(SHELLS))])
    for group in GROUPS:
        for name in next(a.choices for a in within(parser([group]), [group])._actions if isinstance(a.choices, dict)):
            verb = within(parser([group, name]), [group, name])
            if add := verb.get_default("more_arguments"):
                add(verb, [])
            yield _verb(f"{group} {name}", verb)


def _verb(words: str, verb: argparse.ArgumentParser) -> _Verb:
    options, values, places = dict[str, str](), dict[str, str](), list[tuple[str, str]]()
    for action in verb._actions:
        if not action.option_strings:
            places.append(("*" if action.nargs == "+" else str(len(places)), _takes(action)))
        for option in action.option_strings:
            options[option] = (action.help or "").partition(";")[0].replace("'", "")
            if action.nargs != 0:
                values[option] = _takes(action)
    return _Verb(words, options, values, places)


def _takes(action: argparse.Action) -> str:
    if action.dest in ("system", "preset"):
        from tilewright.export.systems import names, system

        presets = sorted({preset for name in names() for preset in system(name).presets})
        return " ".join(names() if action.dest == "system" else presets)
    if action.choices:
        return " ".join(map(str, action.choices))
    if action.type is Path:
        return FOLDERS if action.metavar in FOLDER_METAVARS or "dir" in action.dest else FILES
    return FILES if action.type is str else ""


def _posix(verbs: list[_Verb]) -> str:
    """The part for bash and zsh: a function that sets `takes` to the words that may follow at the cursor."""

    def case(words: str, takes: str) -> str:
        pattern = f"'{words[:-1]}'*" if words.endswith("*") else f"'{words}'"
        return f"    {pattern}) takes='{takes}' ;;"

    return _filled(POSIX, verbs, case, [case(verb.words, " ".join(verb.options)) for verb in verbs])


def _fish(verbs: list[_Verb]) -> str:
    paths = {FILES: "__fish_complete_path (commandline -ct)", FOLDERS: "__fish_complete_directories (commandline -ct)"}

    def case(words: str, takes: str) -> str:
        offer = paths.get(takes, f"string split -n ' ' -- '{takes}'")
        return f"        case '{words}'\n            {offer}"

    options = []
    for verb in verbs:
        lines = " ".join(f"'{option}\t{text}'" for option, text in verb.options.items())
        options.append(f"        case '{verb.words}'\n            printf '%s\\n' {lines}")
    return _filled(FISH, verbs, case, options)


def _filled(text: str, verbs: list[_Verb], case: Callable[[str, str], str], options: list[str]) -> str:
    """Fill a script with its cases, the words that may follow other words."""
    groups: dict[str, list[str]] = {}
    for verb in verbs:
        group, _, name = verb.words.partition(" ")
        groups.setdefault(group, []).extend([name] if name else [])
    with_verbs = [name for name, names in groups.items() if names]
    lines = {
        "GROUPS": " ".join([*groups, "--help", "--version"]),
        "VERBS": "\n".join(case(name, " ".join([*groups[name], "--help"])) for name in with_verbs),
        "VALUES": "\n".join(case(f"{v.words} {option}", takes) for v in verbs for option, takes in v.values.items()),
        "OPTIONS": "\n".join(options),
        "PLACES": "\n".join(case(f"{v.words} {at}", takes) for v in verbs for at, takes in v.places if takes),
    }
    for name, line in lines.items():
        text = text.replace(f"<{name}>", line)
    return text


POSIX = """\
_tilewright_verbs() { # of a group; 1 where the word is none
    case "$1" in
<VERBS>
    *) return 1 ;;
    esac
}

_tilewright_values() { # of an option, after its verb; 1 where it takes none
    case "$1" in
<VALUES>
    *) return 1 ;;
    esac
}

_tilewright_options() {
    case "$1" in
<OPTIONS>
    esac
}

_tilewright_takes() { # the word at the cursor, then those before it
    local current=$1 verb place=0
    takes=
    shift
    if [ $# -eq 0 ]; then
        takes='<GROUPS>'
        return
    fi
    verb=$1
    if _tilewright_verbs "$1"; then
        [ $# -eq 1 ] && return
        verb="$1 $2"
        takes=
        shift
    fi
    shift
    while [ $# -gt 0 ]; do
        if _tilewright_values "$verb $1"; then
            [ $# -eq 1 ] && return
            shift
        elif [ "${1#-}" = "$1" ]; then
            place=$((place + 1))
        fi
        shift
    done
    _tilewright_options "$verb"
    case "$current" in
    -*) return ;;
    esac
    case "$verb $place" in
<PLACES>
    esac
}
"""

BASH = """
_tilewright() { # eval "$(tilewright completion bash)"
    local takes word=${COMP_WORDS[COMP_CWORD]}
    _tilewright_takes "$word" "${COMP_WORDS[@]:1:COMP_CWORD-1}"
    case "$takes" in
    @files) compopt -o filenames 2>/dev/null; mapfile -t COMPREPLY < <(compgen -f -- "$word") ;;
    @folders) compopt -o filenames 2>/dev/null; mapfile -t COMPREPLY < <(compgen -d -- "$word") ;;
    *) mapfile -t COMPREPLY < <(compgen -W "$takes" -- "$word") ;;
    esac
}
complete -F _tilewright tilewright"""

ZSH = """
_tilewright() { # eval "$(tilewright completion zsh)", after compinit
    local takes
    _tilewright_takes "${words[CURRENT]}" "${(@)words[2,CURRENT-1]}"
    case "$takes" in
    @files) _files ;;
    @folders) _files -/ ;;
    *) compadd -- ${=takes} ;;
    esac
}
compdef _tilewright tilewright"""

FISH = """\
function __tilewright_verbs # of a group; 1 where the word is none
    switch "$argv"
<VERBS>
        case '*'
            return 1
    end
end

function __tilewright_values # of an option, after its verb; 1 where it takes none
    switch "$argv"
<VALUES>
        case '*'
            return 1
    end
end

function __tilewright_options
    switch "$argv"
<OPTIONS>
    end
end

function __tilewright_places
    switch "$argv"
<PLACES>
        case '*'
            return 1
    end
end

function __tilewright # tilewright completion fish | source
    set -l words (commandline -opc)
    set -e words[1]
    if not set -q words[1]
        string split ' ' -- '<GROUPS>'
        return
    end
    set -l verb $words[1]
    if __tilewright_verbs $words[1] >/dev/null
        if not set -q words[2]
            __tilewright_verbs $words[1]
            return
        end
        set verb "$words[1] $words[2]"
        set -e words[1]
    end
    set -e words[1]
    set -l place 0
    while set -q words[1]
        if __tilewright_values "$verb $words[1]" >/dev/null
            if not set -q words[2]
                __tilewright_values "$verb $words[1]"
                return
            end
            set -e words[1]
        else if not string match -q -- '-*' $words[1]
            set place (math $place + 1)
        end
        set -e words[1]
    end
    string match -q -- '-*' (commandline -ct)
    or __tilewright_places "$verb $place"
    or __tilewright_options $verb
    string match -q -- '-*' (commandline -ct)
    and __tilewright_options $verb
end
complete -c tilewright -f -a '(__tilewright)'"""
