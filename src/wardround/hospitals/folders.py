"""Where a coordinator and a site keep what is theirs: names of files, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class PartyFolder:
    """What the coordinator and each site have alike."""

    root: Path

    @property
    def federation(self) -> Path:
        """The federation's file; a site's is as it was when the site joined."""
        return self.root / "federation.yaml"

    @property
    def certificates(self) -> Path:
        """The party's own certificate and key for connections, and the authority's certificate."""
        return self.root / "certificates"

    @property
    def roster(self) -> Path:
        """The list of sites and their keys, signed by the root; a site's is the newest that it saw."""
        return self.root / "roster.json"

    @property
    def studies(self) -> Path:
        """A folder for each study: by its name at the coordinator, by its hash at a site."""
        return self.root / "studies"

    @property
    def spool(self) -> Path:
        """Bodies of messages that are under way."""
        return self.root / "spool"

    @property
    def nvflare(self) -> Path:
        """The start-up kits of NVFlare's processes, and what they keep."""
        return self.root / "nvflare"

    @property
    def status(self) -> Path:
        """What the party's process last said of itself, in JSON."""
        return self.root / "status.json"


@dataclass(frozen=True)
class CoordinatorFolder(PartyFolder):
    """The folder of a federation at its coordinator."""

    @property
    def authority(self) -> Path:
        """The folder of the private keys that sign certificates and the list of sites: it may be kept elsewhere."""
        return self.root / "root"

    @property
    def kits(self) -> Path:
        """The start-up kits, an archive a site."""
        return self.root / "kits"

    @property
    def socket(self) -> Path:
        """The unix socket at which NVFlare's server jobs find the coordinator."""
        return self.root / "hub.sock"

    @property
    def lock(self) -> Path:
        """Held by the coordinator's process."""
        return self.root / "coordinator.lock"

    @property
    def token(self) -> Path:
        """The password of the page that shows the federation; it is made when the page is first opened."""
        return self.root / "page.token"


@dataclass(frozen=True)
class StudyFolder:
    """The folder of a submitted study at the coordinator."""

    root: Path

    @property
    def study(self) -> Path:
        """The study as it was submitted, overrides resolved."""
        return self.root / "study.yaml"

    @property
    def submission(self) -> Path:
        """What the coordinator's people want of it; commands write this, and the coordinator's process reads it."""
        return self.root / "submission.json"

    @property
    def record(self) -> Path:
        """How far it is; the coordinator's process writes this."""
        return self.root / "record.json"

    @property
    def decisions(self) -> Path:
        """What the sites decided of it, signed by them."""
        return self.root / "decisions.json"

    @property
    def out(self) -> Path:
        """The folder of the run."""
        return self.root / "out"


@dataclass(frozen=True)
class SiteFolder(PartyFolder):
    """The folder of a site that joined a federation. All that the site keeps of it is in here."""

    @property
    def site(self) -> Path:
        """The site's own file: its one entry in the form of a sites file."""
        return self.root / "site.yaml"

    @property
    def identity(self) -> Path:
        """The key that signs what the site says; it was made here and never leaves."""
        return self.root / "identity.key"

    @property
    def socket(self) -> Path:
        """The unix socket of the resident process; it opens no port."""
        return self.root / "agent.sock"

    @property
    def lock(self) -> Path:
        """Held by the resident process."""
        return self.root / "agent.lock"

    @property
    def stopped(self) -> Path:
        """While this file is there, nothing runs and nothing leaves."""
        return self.root / "stopped"
