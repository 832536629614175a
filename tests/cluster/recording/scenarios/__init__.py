"""The requests whose answers are recorded: every kind of answer that the launcher depends on, a module a topic.

Each scenario creates what it needs in a namespace of its own, and names the functions of launcher/ that rely on the answers.
"""

from tests.cluster.recording.scenarios import access, changing, creating, deleting, listing, missing, server

assert all((access, changing, creating, deleting, listing, missing, server)), "imported so that they register"
