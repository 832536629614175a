"""report.html: its contents, the page, a file a section."""
