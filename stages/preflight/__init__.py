"""Whether a disk will boot over there: facts about a system, rules of a target, findings with their remedies."""
