"""An image that stays as it is at a moment, under overlays: of a machine that may go back to that
moment, and of its clones."""

from __future__ import annotations

from _thread import allocate_lock

from vmm.block.overlay import Overlay
from vmm.errors import StateError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmm.block.nbd import NbdImage
    from vmm.block.raw import RawImage


class Frozen:
    """What `image` is now, to be read only; shared by counting.

    Args:
        image: from now on nobody's but this object's; closed with the last user.
    """

    readonly = True
    frozen = True

    def __init__(self, image: RawImage | NbdImage | Overlay) -> None:
        self.image = image
        self.path: str = image.path
        self.size: int = image.size
        self.direct: bool = image.direct
        self._users = 1
        self._lock = allocate_lock()

    def __repr__(self) -> str:
        return f"Frozen({self.image!r})"

    def share(self) -> Frozen:
        """One user more."""
        with self._lock:
            self._users += 1
        return self

    def close(self) -> None:
        """One user less; the last one closes the image."""
        with self._lock:
            self._users -= 1
            last = not self._users
        if last:
            self.image.close()

    def found(self) -> int:
        """Bytes it has, for good."""
        return self.size

    def grow(self, size: int) -> None:
        """StateError: others share it."""
        raise StateError(f"{self.path}: a checkpoint, or clones, share this disk")

    def read(self, views: Sequence[memoryview], offset: int) -> None:
        """Fill `views` from byte `offset`."""
        self.image.read(views, offset)

    def read_cached(self, views: Sequence[memoryview], offset: int, size: int) -> bool:
        """See `RawImage.read_cached`."""
        return self.image.read_cached(views, offset, size)

    def take(self, top: Overlay) -> bool:
        """Have what `top`, the one user beside the caller, was written become part of the image;
        False if it cannot be: others read it, or no overlay is below."""
        if self._users != 2 or not isinstance(self.image, Overlay):
            return False
        top.fold(self.image)
        return True
