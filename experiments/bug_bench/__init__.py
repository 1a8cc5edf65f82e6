"""Three trainers with bugs to switch on, and a table of those that an audit names."""
