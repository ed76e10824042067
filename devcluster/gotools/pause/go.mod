// Builds the pause program: the root process of every pod and the keeper of every node's mount namespace.
module trainyard.dev/devcluster/gotools/pause

go 1.25.0
