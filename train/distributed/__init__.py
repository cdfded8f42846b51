"""The processes of a run: who they are, how they meet, and how one that is lost or stuck is noticed."""
