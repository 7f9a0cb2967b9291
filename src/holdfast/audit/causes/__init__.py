"""What makes trainings diverge: a module for each family, which looks at the evidence and yields what it sees."""
