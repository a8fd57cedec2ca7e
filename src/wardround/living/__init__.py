"""Models that go on learning: updates of a release, the gate, the chain of releases, joining and leaving."""
