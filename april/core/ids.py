"""Names of things: immutable, printable, ordered by age."""

from __future__ import annotations

from typing import NamedTuple

Version = int
"""Number of optimiser updates that the weights have seen; 0 = the weights the run started from."""

NO_VERSION: Version = -1
"""Version of tokens that no policy sampled (environment output, forced prefixes)."""


class GroupId(NamedTuple):
    """One attempt at one prompt by a group of samples.

    Attributes:
        serial: order of issue in the run, from 0; first, so that ids sort by age.
        epoch: pass over the data set, from 0.
        prompt: id of the prompt.
    """

    serial: int
    epoch: int
    prompt: str

    def __str__(self) -> str:
        return f"g{self.serial}/e{self.epoch}/{self.prompt}"

    def member(self, index: int) -> SampleId:
        """The id of the sample with this index in the group."""
        return tuple.__new__(SampleId, (*self, index, ""))


class SampleId(NamedTuple):
    """One attempt: (group, member, branch).

    Attributes:
        serial, epoch, prompt: those of the group.
        member: index in the group, from 0.
        branch: path of forks from the group's root sample, such as "0.2"; empty for a root.
    """

    serial: int
    epoch: int
    prompt: str
    member: int
    branch: str = ""

    @property
    def group(self) -> GroupId:
        """The group this sample belongs to."""
        return tuple.__new__(GroupId, self[:3])  # asked several times for each event: twice as fast as by its fields

    def __str__(self) -> str:
        return f"{self.group}/m{self.member}" + (f"/{self.branch}" if self.branch else "")
