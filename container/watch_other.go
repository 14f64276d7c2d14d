//go:build !unix

package container

func diskFree(string) (bytes int64, known bool) { return 0, false }

func isNotDir(error) bool { return false }
