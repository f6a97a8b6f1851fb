package main

import (
	"cmp"
	"fmt"

	"github.com/spf13/pflag"

	"github.com/mpathd/mpathd/config"
	"github.com/mpathd/mpathd/initiator"
)

// chapFlags are the CHAP settings of a command line, by the keywords of the
// configuration.
type chapFlags struct{ config.Section }

var chapKeywords = []struct{ flag, keyword, usage string }{
	{"chap-user", "chap_user", "CHAP user of PATH-URLs and portals that name none"},
	{"chap-secret-file", "chap_secret_file", "file with its secret, one line, mode 0600"},
	{"mutual-chap-user", "mutual_chap_user", "what the target must call itself"},
	{"mutual-chap-secret-file", "mutual_chap_secret_file", "file with the secret that the target must prove to know"},
	{"chap-algs", "chap_algs", "CHAP algorithms to offer, of SHA3-256,SHA256,SHA1,MD5 (default: all)"},
}

func (c *chapFlags) register(f *pflag.FlagSet) {
	c.Section = config.Section{}
	for _, k := range chapKeywords {
		f.Func(k.flag, k.usage, func(v string) error { c.Section[k.keyword] = v; return nil })
	}
	f.BoolFunc("chap-short-secrets", "accept secrets under 12 bytes", func(string) error { c.Section["chap_short_secrets"] = "yes"; return nil })
}

// parseURLs reads PATH-URLs; those that need them get the credentials of the flags.
func (c *chapFlags) parseURLs(args []string) ([]initiator.URL, error) {
	var urls []initiator.URL
	for _, a := range args {
		u, err := initiator.ParseURL(a)
		if err != nil {
			return nil, usageError{err}
		}
		if u.Secret != "" {
			logger().Warn("the secret in a PATH-URL on the command line can be seen by every user of this host: name the user alone, and --chap-secret-file", "url", u.String())
		}
		if u.Credentials, err = withCredentials(c.Section, u.Credentials); err != nil {
			return nil, fmt.Errorf("%s: %w", u, err)
		}
		urls = append(urls, u)
	}
	return urls, nil
}

// withCredentials gives those of a URL what the settings add: all, or what
// belongs to the URL's own user.
func withCredentials(s config.Section, u initiator.Credentials) (initiator.Credentials, error) {
	c, err := readCredentials(s)
	if err != nil {
		return c, err
	}
	if u.User != "" && (u.Secret != "" || c.User != "" && c.User != u.User) { // another user: nothing of the settings is about it
		c.Secret, c.MutualUser, c.MutualSecret = u.Secret, "", ""
	}
	c.User = cmp.Or(u.User, c.User)
	return c, c.Check()
}

// readCredentials are the CHAP settings of a section.
func readCredentials(s config.Section) (c initiator.Credentials, err error) {
	c.User, c.MutualUser, c.ShortSecrets = s["chap_user"], s["mutual_chap_user"], s["chap_short_secrets"] == "yes"
	if c.Secret, err = readSecret(s, "chap_secret_file"); err != nil {
		return c, err
	}
	if c.MutualSecret, err = readSecret(s, "mutual_chap_secret_file"); err != nil {
		return c, err
	}
	if v := s["chap_algs"]; v != "" {
		c.Algorithms, err = initiator.ParseAlgorithms(v)
	}
	return c, err
}

// readSecret reads the file that a keyword names.
func readSecret(s config.Section, keyword string) (initiator.Secret, error) {
	if s[keyword] == "" {
		return "", nil
	}
	v, err := initiator.ReadSecret(s[keyword])
	if err != nil {
		return "", fmt.Errorf("%s: %w", keyword, err)
	}
	return v, nil
}

// ofTarget are the settings that hold for a target block: its own user with its
// own secrets, or else those of the whole section; algorithms and the like are
// inherited one by one.
func ofTarget(whole, own config.Section) config.Section {
	out := config.Section{}
	for _, k := range []string{"chap_algs", "chap_short_secrets"} {
		out[k] = cmp.Or(own[k], whole[k])
	}
	from := whole
	for _, k := range []string{"chap_user", "chap_secret_file", "mutual_chap_user", "mutual_chap_secret_file"} {
		if own[k] != "" {
			from = own
		}
	}
	for _, k := range []string{"chap_user", "chap_secret_file", "mutual_chap_user", "mutual_chap_secret_file"} {
		out[k] = from[k]
	}
	return out
}
