"""The contract between recording and rebroadcasting: what a store holds, and how its bytes are checked."""
