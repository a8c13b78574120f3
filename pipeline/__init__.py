"""Records teachers: source shards in, committed parts of a store out."""
