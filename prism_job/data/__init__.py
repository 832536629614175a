"""Where rows come from (files, folders, s3://) and what a row means: layouts, content, labels."""
