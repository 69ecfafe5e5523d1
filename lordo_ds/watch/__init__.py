"""Who is alive: heartbeats, judgement, and the end of a job whose ranks are dead, frozen or stuck."""
