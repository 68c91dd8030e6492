"""Whether timm's pretrained weights can be had, found out in seconds.

The hub's own library retries for most of a minute before it gives up, and torch and timm take seconds to import; nothing here
needs either.
"""

import threading
import urllib.error
import urllib.request
from pathlib import Path

from huggingface_hub import constants

from siman_convert.errors import InputError

PROBE_SECONDS = 2.0  # how long a hub may take to answer at all
WAYS_OUT = "give a local file with --weights FILE, or start from random weights with --weights none --fp-epochs N"


def require_weights_in_reach(name: str) -> None:
    """Raise InputError when the hub's cache holds nothing of timm model `name` and the hub does not answer."""
    folder = Path(constants.HF_HUB_CACHE)
    pattern = f"models--timm--{name}" if "." in name else f"models--timm--{name}.*"
    if not any(folder.glob(f"{pattern}/snapshots/*/*")):
        require_answer(name, constants.ENDPOINT)


def require_answer(name: str, url: str) -> None:
    """Raise InputError unless the server of `url`, which has the weights of `name`, answers (or is not to be asked)."""
    offline = constants.HF_HUB_OFFLINE
    if offline or not answers(url):
        why = "HF_HUB_OFFLINE is set" if offline else f"no answer from {url.split('/')[2]} in {PROBE_SECONDS:.0f} s"
        raise InputError(f"{name}: pretrained weights are not in the local cache and {why}; {WAYS_OUT}")


def answers(url: str) -> bool:
    """Whether a server answers at all, whatever it says. In a thread, since name resolution knows no time-out."""
    answered = threading.Event()
    finished = threading.Event()

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PROBE_SECONDS).close()
            answered.set()
        except urllib.error.HTTPError:
            answered.set()  # gated or moved: the library that downloads will say what is wrong
        except (OSError, ValueError):
            pass
        finally:
            finished.set()

    threading.Thread(target=ask, daemon=True).start()
    finished.wait(PROBE_SECONDS)
    return answered.is_set()
